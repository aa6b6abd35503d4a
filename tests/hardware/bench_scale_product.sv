// scale_product as words in, words out (bench.cpp).
module bench (
    input  logic [95:0] in,
    output logic [95:0] out
);
    assign out[95:14] = '0;
    scale_product dut (.a(in[7:0]), .b(in[15:8]), .a_fp8(in[16]), .b_fp8(in[17]),
                       .significand(out[7:0]), .shift(out[12:8]), .nan(out[13]));
endmodule
