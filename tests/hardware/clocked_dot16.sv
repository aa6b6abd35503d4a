// dot16_registered (RTL or netlist) as bits in, bits out (bench_clocked.sv).
module clocked (
    input  logic         clock,
    input  logic [257:0] in,
    output logic [41:0]  out
);
    dot16_registered dut (.clock(clock), .a(in[127:0]), .b(in[255:128]), .a_fp8(in[256]),
                          .b_fp8(in[257]), .acc(out[40:0]), .nan(out[41]));
endmodule
