// Third stage of quantize16: the exact weighted error of a tile against the threshold.
//
//     error = sum of sensitivity * difference^2, in units of 2^-29
//
// A lane stays below 2^57, so 61 bits hold the sum.
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
            logic [56:0] weighted;
            error_lane lane (.difference(difference[9*k+:9]), .place(place[4*k+:4]),
                             .sensitivity(sensitivity[7*k+:7]), .weighted(weighted));
            assign terms[61*k+:61] = {4'd0, weighted};
        end
    endgenerate

    logic [2*61-1:0] two;
    compress16 #(.WIDTH(61)) tree (.terms(terms), .pair(two));
    assign error = two[0+:61] + two[61+:61];
    assign fp4   = ~nan & ~threshold[61] & error <= threshold[60:0];
endmodule
