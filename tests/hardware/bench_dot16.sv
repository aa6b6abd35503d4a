// dot16 as words in, words out (bench.cpp).
module bench (
    input  logic [287:0] in,
    output logic [95:0]  out
);
    assign out[95:42] = '0;
    dot16 dut (.a(in[127:0]), .b(in[255:128]), .a_fp8(in[256]), .b_fp8(in[257]), .acc(out[40:0]),
               .nan(out[41]));
endmodule
