// Second stage of quantize16: 16 lanes of quantize_lane at one scale (E4M3, without its sign).
module quantize16_codes #(
    parameter MANT = 7
) (
    input  logic [16*(8+MANT)-1:0] magnitude,
    input  logic [6:0]             scale,
    output logic [47:0]            code4,
    output logic [111:0]           code8,
    output logic [143:0]           difference,
    output logic [63:0]            place
);
    localparam WIDTH = 8 + MANT;
    logic       normal;
    logic [3:0] significand, shift;
    assign normal      = |scale[6:3];
    assign significand = {normal, scale[2:0]};
    assign shift       = scale[6:3] - {3'd0, normal};
    generate
        genvar k;
        for (k = 0; k < 16; k = k + 1) begin : lanes
            quantize_lane #(.MANT(MANT)) lane (
                .u(magnitude[WIDTH*k+:WIDTH]), .significand(significand), .shift(shift),
                .code4(code4[3*k+:3]), .code8(code8[7*k+:7]), .difference(difference[9*k+:9]),
                .place(place[4*k+:4]));
        end
    endgenerate
endmodule
