// quantize16 as words in, words out (bench.cpp); the inputs are padded to 8 * (MANT + 9) / 16 + 6 words.
module bench #(
    parameter MANT = 7,
    parameter IN = 448
) (
    input  logic [IN-1:0]  in,
    output logic [287:0]   out
);
    localparam U = 16 * (9 + MANT);
    assign out[287:262] = '0;
    quantize16 #(.MANT(MANT)) dut (
        .u(in[U-1:0]), .sensitivity(in[U+:128]), .threshold(in[U+128+:62]), .error(out[60:0]),
        .fp4(out[61]), .scale(out[69:62]), .codes4(out[133:70]), .codes8(out[261:134]));
endmodule
