// quantize16 in three pipelined stages between registers, the unit that is synthesized and measured: one
// tile a cycle, result four rising edges after its activations were taken.  The result has the operand
// form of dot16: FP4 codes in low nibbles under `scale`, or FP8 codes under the constant scale 6.0 (4C).
// `threshold` is set once, not per tile.
module quantize16_registered #(
    parameter MANT = 7
) (
    input  logic                   clock,
    input  logic [16*(9+MANT)-1:0] u,
    input  logic [127:0]           sensitivity,
    input  logic [61:0]            threshold,
    output logic                   fp8,
    output logic [7:0]             scale,
    output logic [127:0]           codes
);
    localparam WIDTH = 8 + MANT;
    logic [16*(9+MANT)-1:0] taken_u;
    logic [111:0]           taken_weights, weights, weights1, weights2;
    logic [61:0]            limit;
    logic [16*WIDTH-1:0]    magnitude, magnitude1;
    logic [15:0]            sign, sign1, sign2, nan, nan1, nan2, unused;
    logic [6:0]             scale0, scale1, scale2;
    logic [47:0]            code4, code4_2;
    logic [111:0]           code8, code8_2;
    logic [143:0]           difference, difference2;
    logic [63:0]            place, place2;
    logic [60:0]            unused_error;
    logic                   fp4;
    logic [127:0]           chosen;

    quantize16_scale #(.MANT(MANT)) stage1 (.u(taken_u), .magnitude(magnitude), .sign(sign), .nan(nan),
                                            .scale(scale0));
    quantize16_codes #(.MANT(MANT)) stage2 (.magnitude(magnitude1), .scale(scale1), .code4(code4),
                                            .code8(code8), .difference(difference), .place(place));
    quantize16_error stage3 (.difference(difference2), .place(place2), .sensitivity(weights2),
                             .threshold(limit), .nan(|nan2), .error(unused_error), .fp4(fp4));
    generate
        genvar k;
        for (k = 0; k < 16; k = k + 1) begin : lanes
            assign weights[7*k+:7] = sensitivity[8*k+:7];
            assign unused[k]       = sensitivity[8*k+7];
            assign chosen[8*k+:8]  = fp4 ? {4'd0, sign2[k], code4_2[3*k+:3]}
                                         : {sign2[k], code8_2[7*k+:7] | {7{nan2[k]}}};
        end
    endgenerate

    always_ff @(posedge clock) begin
        taken_u       <= u;
        taken_weights <= weights;
        limit         <= threshold;
        magnitude1    <= magnitude;
        sign1         <= sign;
        nan1          <= nan;
        scale1        <= scale0;
        weights1      <= taken_weights;
        code4_2       <= code4;
        code8_2       <= code8;
        difference2   <= difference;
        place2        <= place;
        sign2         <= sign1;
        nan2          <= nan1;
        scale2        <= scale1;
        weights2      <= weights1;
        fp8           <= ~fp4;
        scale         <= fp4 ? {1'b0, scale2} : 8'h4C;
        codes         <= chosen;
    end
endmodule
