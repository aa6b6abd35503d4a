// Product of the scales of two tiles, exact: significand (8 bits) * 2^shift * 2^-18.
//
// An FP8 tile has no scale of its own: with the tensor scale defined as 6 * s2 it is a tile whose E4M3
// scale is the constant 6.0 (4C).  Scales are positive, so bit 7 of a code is not read; `nan` says that an
// FP4 tile's scale was the E4M3 NaN.
module scale_product (
    input  logic [7:0] a,
    input  logic [7:0] b,
    input  logic       a_fp8,
    input  logic       b_fp8,
    output logic [7:0] significand,
    output logic [4:0] shift,
    output logic       nan
);
    logic [7:0] scale_a, scale_b;
    logic [3:0] significand_a, significand_b, shift_a, shift_b;
    logic       sign_a, sign_b, nan_a, nan_b, unused;

    assign scale_a = a_fp8 ? 8'h4C : {1'b0, a[6:0]};
    assign scale_b = b_fp8 ? 8'h4C : {1'b0, b[6:0]};
    fp_decode decode_a (.code(scale_a), .fp8(1'b1), .sign(sign_a), .significand(significand_a),
                        .shift(shift_a), .nan(nan_a));
    fp_decode decode_b (.code(scale_b), .fp8(1'b1), .sign(sign_b), .significand(significand_b),
                        .shift(shift_b), .nan(nan_b));
    assign significand = {4'h0, significand_a} * {4'h0, significand_b};
    assign shift       = {1'b0, shift_a} + {1'b0, shift_b};
    assign nan         = nan_a | nan_b;
    assign unused      = &{1'b0, a[7], b[7], sign_a, sign_b};
endmodule
