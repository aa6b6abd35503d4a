// Feeds one line of IN + OUT hexadecimal bits {expected, input} a cycle to `clocked` and compares its
// output LATENCY rising edges later.  Inputs change while the clock is low, and start again at the end.  With DUMP set, the signals
// of the unit itself, not those inside its cells, go to a VCD file once the pipeline is full.
`timescale 1ns / 10ps
module bench_clocked;
    parameter IN = 258;
    parameter OUT = 42;
    parameter COUNT = 1000;
    parameter LATENCY = 2;
    parameter DUMP = 0;

    reg  [IN+OUT-1:0] vectors[0:COUNT-1];
    reg               clock;
    reg  [IN-1:0]     in;
    wire [OUT-1:0]    out;
    integer           cycle, wrong;
    reg  [1023:0]     path;

    clocked unit (.clock(clock), .in(in), .out(out));

    initial begin
        if (!$value$plusargs("vectors=%s", path)) $finish;
        $readmemh(path, vectors);
        if (DUMP != 0 && $value$plusargs("vcd=%s", path)) $dumpfile(path);
        clock = 0;
        wrong = 0;
        for (cycle = 0; cycle < COUNT + LATENCY; cycle = cycle + 1) begin
            in = vectors[cycle%COUNT][IN-1:0];
            #200;
            if (DUMP != 0 && cycle == 2 * LATENCY) $dumpvars(1, unit.dut);
            if (cycle >= LATENCY && out !== vectors[cycle-LATENCY][IN+:OUT]) begin
                wrong = wrong + 1;
                if (wrong <= 3) $display("vector %0d gave %h, expected %h", cycle - LATENCY, out,
                                         vectors[cycle-LATENCY][IN+:OUT]);
            end
            clock = 1;
            #200 clock = 0;
        end
        $display("%0d %0d", COUNT, wrong);
        $finish;
    end
endmodule
