// Product of two lanes of which at least one is E4M3, as sign and magnitude: 4 x 4 bit significands are
// multiplied, then shifted by the sum of both shifts (0 to 28).  An E2M1 operand has two bits and shifts by
// 0 to 2, so that the upper product bits rest.  The shifter's small steps come first: a stage is only as
// wide as its largest result.
//
// Bits used: 22 (mixed, at most 229376 * 12) or 36 (E4M3 x E4M3, 229376^2).
module wide_lane (
    input  logic [7:0]  a,
    input  logic [7:0]  b,
    input  logic        a_fp8,
    input  logic        b_fp8,
    output logic        sign,
    output logic [35:0] magnitude,
    output logic        nan
);
    logic       sign_a, sign_b, nan_a, nan_b;
    logic [3:0] significand_a, significand_b, shift_a, shift_b;
    logic [4:0] shift;
    logic [7:0] product;

    fp_decode decode_a (.code(a), .fp8(a_fp8), .sign(sign_a), .significand(significand_a),
                        .shift(shift_a), .nan(nan_a));
    fp_decode decode_b (.code(b), .fp8(b_fp8), .sign(sign_b), .significand(significand_b),
                        .shift(shift_b), .nan(nan_b));

    assign sign    = sign_a ^ sign_b;
    assign nan     = nan_a | nan_b;
    assign product = {4'b0000, significand_a} * {4'b0000, significand_b};
    assign shift   = {1'b0, shift_a} + {1'b0, shift_b};

    logic [8:0]  by1;
    logic [10:0] by2;
    logic [14:0] by4;
    logic [22:0] by8;
    assign by1       = shift[0] ? {product, 1'b0} : {1'b0, product};
    assign by2       = shift[1] ? {by1, 2'b00} : {2'b00, by1};
    assign by4       = shift[2] ? {by2, 4'h0} : {4'h0, by2};
    assign by8       = shift[3] ? {by4, 8'h00} : {8'h00, by4};
    // A shift of 28 or less of a product below 2^8 never reaches bit 36.
    assign magnitude = shift[4] ? {by8[19:0], 16'h0000} : {13'h0000, by8};
endmodule
