// Product of two E2M1 codes as sign and magnitude, in units of 2^-2 (at most 12 * 12): two-bit
// significands, shifted by 0 to 4.
module fp4_lane (
    input  logic [3:0] a,
    input  logic [3:0] b,
    output logic       sign,
    output logic [7:0] magnitude
);
    logic       normal_a, normal_b;
    logic [1:0] significand_a, significand_b, shift_a, shift_b;
    logic [2:0] shift;
    logic [3:0] product;
    assign normal_a      = |a[2:1];
    assign normal_b      = |b[2:1];
    assign significand_a = {normal_a, a[0]};
    assign significand_b = {normal_b, b[0]};
    assign shift_a       = a[2:1] - {1'b0, normal_a};
    assign shift_b       = b[2:1] - {1'b0, normal_b};

    assign sign    = a[3] ^ b[3];
    assign product = {2'b00, significand_a} * {2'b00, significand_b};
    assign shift   = {1'b0, shift_a} + {1'b0, shift_b};

    logic [4:0] by1;
    logic [6:0] by2;
    assign by1       = shift[0] ? {product, 1'b0} : {1'b0, product};
    assign by2       = shift[1] ? {by1, 2'b00} : {2'b00, by1};
    // A shift of 4 comes with a product of at most 9.
    assign magnitude = shift[2] ? {by2[3:0], 4'h0} : {1'b0, by2};
endmodule
