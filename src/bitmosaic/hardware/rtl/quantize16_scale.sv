// First stage of quantize16: clamps 16 activations to 2688 and finds the tile's E4M3 scale.
//
//     u          lane k at (9+MANT)k: sign, 8 exponent bits, MANT fraction bits; units of s2
//     magnitude  as u without its sign, at most 2688 (infinities and NaN become 2688)
//     scale      E4M3 of max / 6, at least 2^-9; of an all-zero tile 1.0
module quantize16_scale #(
    parameter MANT = 7
) (
    input  logic [16*(9+MANT)-1:0] u,
    output logic [16*(8+MANT)-1:0] magnitude,
    output logic [15:0]            sign,
    output logic [15:0]            nan,
    output logic [6:0]             scale
);
    localparam WIDTH = 8 + MANT;
    // 2688 = 1.3125 * 2^11: exponent 138, fraction 0101000...
    localparam [WIDTH-1:0] LARGEST = {8'd138, 4'b0101, {(MANT - 4) {1'b0}}};

    generate
        genvar k;
        for (k = 0; k < 16; k = k + 1) begin : lanes
            logic [WIDTH-1:0] given;
            assign given   = u[(WIDTH+1)*k+:WIDTH];
            assign sign[k] = u[(WIDTH+1)*k+WIDTH];
            assign nan[k]  = &given[WIDTH-1-:8] & |given[MANT-1:0];
            assign magnitude[WIDTH*k+:WIDTH] = given > LARGEST ? LARGEST : given;
        end
    endgenerate

    function automatic [WIDTH-1:0] larger(input [WIDTH-1:0] x, input [WIDTH-1:0] y);
        larger = x > y ? x : y;
    endfunction

    logic [8*WIDTH-1:0] eight;
    logic [4*WIDTH-1:0] four;
    logic [2*WIDTH-1:0] two;
    generate
        for (k = 0; k < 8; k = k + 1) begin : of16
            assign eight[WIDTH*k+:WIDTH] = larger(magnitude[2*WIDTH*k+:WIDTH], magnitude[2*WIDTH*k+WIDTH+:WIDTH]);
        end
        for (k = 0; k < 4; k = k + 1) begin : of8
            assign four[WIDTH*k+:WIDTH] = larger(eight[2*WIDTH*k+:WIDTH], eight[2*WIDTH*k+WIDTH+:WIDTH]);
        end
        for (k = 0; k < 2; k = k + 1) begin : of4
            assign two[WIDTH*k+:WIDTH] = larger(four[2*WIDTH*k+:WIDTH], four[2*WIDTH*k+WIDTH+:WIDTH]);
        end
    endgenerate

    logic [WIDTH-1:0] largest;
    logic [6:0]       sixth;
    assign largest = larger(two[0+:WIDTH], two[WIDTH+:WIDTH]);
    e4m3_sixth #(.MANT(MANT)) encode (.u(largest), .code(sixth));
    assign scale = largest == '0 ? 7'h38 : sixth == 7'h00 ? 7'h01 : sixth;
endmodule
