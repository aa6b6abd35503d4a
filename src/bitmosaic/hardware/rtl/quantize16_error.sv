// Third stage of quantize16: the exact weighted error of a tile against the threshold.
//
//     error = sum of sensitivity * difference^2, in units of 2^-29
//
// A lane: difference^2 (17 bits) * significand of the sensitivity (4) * 2^(2 place + its shift) * 2^-35.
// Where place < 3 the difference is a multiple of 2^(3-place), so the lowest six bits are always 0 and
// are left out.  At most 16 * 288^2 * 15 * 2^(28+14-6), below 2^61.
module quantize16_error (
    input  logic [143:0] difference,
    input  logic [63:0]  place,
    input  logic [111:0] sensitivity,
    input  logic [61:0]  threshold,
    input  logic         nan,
    output logic [60:0]  error,
    output logic         fp4
);
    logic [16*61-1:0] terms;
    generate
        genvar k;
        for (k = 0; k < 16; k = k + 1) begin : lanes
            logic [16:0] square;
            logic [20:0] weighted;
            logic [3:0]  exponent;
            logic        normal;
            logic [5:0]  left;
            logic [62:0] moved;
            logic        unused;
            assign square   = {8'd0, difference[9*k+:9]} * {8'd0, difference[9*k+:9]};
            assign exponent = sensitivity[7*k+3+:4];
            assign normal   = |exponent;
            assign weighted = {4'd0, square} * {17'd0, normal, sensitivity[7*k+:3]};
            assign left     = {1'b0, place[4*k+:4], 1'b0} + {2'd0, exponent - {3'd0, normal}};
            assign moved    = {42'd0, weighted} << left;
            assign terms[61*k+:61] = {4'd0, moved[62:6]};
            assign unused   = &{1'b0, moved[5:0]};
        end
    endgenerate

    logic [8*61-1:0] eight;
    logic [4*61-1:0] four;
    logic [2*61-1:0] two;
    generate
        for (k = 0; k < 4; k = k + 1) begin : fours
            compress4 #(.WIDTH(61)) part (.terms(terms[244*k+:244]), .pair(eight[122*k+:122]));
        end
    endgenerate
    compress4 #(.WIDTH(61)) low_half (.terms(eight[0+:244]), .pair(four[0+:122]));
    compress4 #(.WIDTH(61)) high_half (.terms(eight[244+:244]), .pair(four[122+:122]));
    compress4 #(.WIDTH(61)) both (.terms(four), .pair(two));
    assign error = two[0+:61] + two[61+:61];
    assign fp4   = ~nan & ~threshold[61] & error <= threshold[60:0];
endmodule
