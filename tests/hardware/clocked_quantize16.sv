// quantize16_registered (RTL or netlist, bf16) as bits in, bits out (bench_clocked.sv).
module clocked (
    input  logic         clock,
    input  logic [445:0] in,
    output logic [136:0] out
);
    quantize16_registered dut (.clock(clock), .u(in[255:0]), .sensitivity(in[383:256]),
                               .threshold(in[445:384]), .fp8(out[0]), .scale(out[8:1]),
                               .codes(out[136:9]));
endmodule
