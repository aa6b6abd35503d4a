// Second stage of quantize16, one lane: both codes of a magnitude, and their difference.
//
//     significand, shift  the tile's scale: significand * 2^shift * 2^-9
//     code4               E2M1 magnitude: |u| against {1, 3, 5, 7, 10, 14, 20} / 4 * scale
//     code8               E4M3 magnitude of |u| / 6
//     difference, place   |6 code8 - code4 scale| = difference * 2^place * 2^-13, exact
//
// A code4 above 0 has |u| >= scale / 4, so that code8's last place is at most 5 binary places below
// the scale's: both values are then multiples of 2^(shift-13), and their difference, at most a step of
// E2M1 at its top (2 significands), half a clipped top step and half a step of E4M3, stays below 2^9.
// A code4 of 0 needs no alignment: the difference is code8 itself, at its own place where that is lower.
module quantize_lane #(
    parameter MANT = 7
) (
    input  logic [8+MANT-1:0] u,
    input  logic [3:0]        significand,
    input  logic [3:0]        shift,
    output logic [2:0]        code4,
    output logic [6:0]        code8,
    output logic [8:0]        difference,
    output logic [3:0]        place
);
    // |u| in units of 2^(shift-11): nine bits (at most 4 * 6 * 15.5) and a sticky bit.
    logic [7:0]       right;
    logic [MANT+15:0] aligned, moved;
    logic [9:0]       units;
    assign right   = 8'd124 + {4'd0, shift} - u[MANT+:8];
    assign aligned = {|u[MANT+:8], u[MANT-1:0], 15'd0};
    assign moved   = aligned >> right[3:0];
    assign units   = |right[7:4] ? {9'd0, |aligned} : {moved[MANT+15-:9], |moved[MANT+6:0]};

    function automatic above(input [9:0] value, input [8:0] limit, input tie_goes_up);
        above = value > {limit, 1'b0} | (tie_goes_up & value == {limit, 1'b0});
    endfunction
    function automatic [2:0] e2m1(input [9:0] value, input [8:0] s);
        begin
            e2m1 = 3'd0;
            if (above(value, s, 1'b0)) e2m1 = 3'd1;
            if (above(value, s * 9'd3, 1'b1)) e2m1 = 3'd2;
            if (above(value, s * 9'd5, 1'b0)) e2m1 = 3'd3;
            if (above(value, s * 9'd7, 1'b1)) e2m1 = 3'd4;
            if (above(value, s * 9'd10, 1'b0)) e2m1 = 3'd5;
            if (above(value, s * 9'd14, 1'b1)) e2m1 = 3'd6;
            if (above(value, s * 9'd20, 1'b0)) e2m1 = 3'd7;
        end
    endfunction
    assign code4 = e2m1(units, {5'd0, significand});

    e4m3_sixth #(.MANT(MANT)) encode (.u(u), .code(code8));

    // Low: halves of the grid (0 1 2 3 4 6 8 12) times the scale's significand, times 8.
    logic [3:0]  halves;
    logic [7:0]  steps;
    logic [10:0] low, gap;
    assign halves = code4[2:1] == 2'd0 ? {3'd0, code4[0]}
                                       : {2'd0, 1'b1, code4[0]} << (code4[2:1] - 2'd1);
    assign steps  = {4'd0, halves} * {4'd0, significand};
    assign low    = {steps, 3'd0};

    // High: three significands at place shift8 + 5 of 2^-13.
    logic        normal8, apart;
    logic [3:0]  shift8;
    logic [4:0]  place8, up;
    logic [5:0]  triple;
    logic [10:0] high;
    assign normal8 = |code8[6:3];
    assign shift8  = code8[6:3] - {3'd0, normal8};
    assign triple  = {2'd0, normal8, code8[2:0]} + {1'b0, normal8, code8[2:0], 1'b0};
    assign place8  = {1'b0, shift8} + 5'd5;
    assign apart   = place8 < {1'b0, shift};
    assign up      = place8 - {1'b0, shift};
    assign high    = {5'd0, triple} << up[2:0];

    assign gap        = high > low ? high - low : low - high;
    assign difference = apart ? {3'd0, triple} : gap[8:0];
    assign place      = apart ? place8[3:0] : shift;
endmodule
