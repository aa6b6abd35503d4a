// Third stage of quantize16, one lane: sensitivity * (difference * 2^place)^2, in units of 2^-29 for a
// difference in units of 2^-13.
//
// difference^2 (17 bits) * significand of the sensitivity (4) is shifted by 2 place + the sensitivity's
// shift, 0 to 42, and counts in 2^-35.  Where place < 3 the difference is a multiple of 2^(3-place), so the
// lowest six bits are always 0 and are left out.  At most 288^2 * 15 * 2^(28+14-6), below 2^57.
module error_lane (
    input  logic [8:0]  difference,
    input  logic [3:0]  place,
    input  logic [6:0]  sensitivity,
    output logic [56:0] weighted
);
    logic        normal;
    logic [3:0]  shift;
    logic [5:0]  left;
    logic [16:0] square;
    logic [20:0] product;
    assign normal  = |sensitivity[6:3];
    assign shift   = sensitivity[6:3] - {3'd0, normal};
    assign left    = {1'b0, place, 1'b0} + {2'd0, shift};
    assign square  = {8'd0, difference} * {8'd0, difference};
    assign product = {4'd0, square} * {17'd0, normal, sensitivity[2:0]};

    // Small steps first: each stage is only as wide as its largest result.
    logic [21:0] by1;
    logic [23:0] by2;
    logic [27:0] by4;
    logic [35:0] by8;
    logic [51:0] by16;
    logic [62:0] by32;
    assign by1  = left[0] ? {product, 1'b0} : {1'b0, product};
    assign by2  = left[1] ? {by1, 2'b00} : {2'b00, by1};
    assign by4  = left[2] ? {by2, 4'h0} : {4'h0, by2};
    assign by8  = left[3] ? {by4, 8'h00} : {8'h00, by4};
    assign by16 = left[4] ? {by8, 16'h0000} : {16'h0000, by8};
    // A shift of at most 42 of less than 2^21 stays below 2^63.
    assign by32 = left[5] ? {by16[30:0], 32'h00000000} : {11'd0, by16};
    assign weighted = by32[62:6];
endmodule
