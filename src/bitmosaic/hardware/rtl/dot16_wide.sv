// Exact dot product of two tiles of 16 of which at least one is FP8; ports as in dot16.
//
// Lanes give sign and magnitude of w = 22 (mixed) or 36 bits.  A negative one is inverted, and what
// inversion lacks, -p = ~p + 1 - 2^w, is added once for all N negative lanes: N - N * 2^w.  So no sign is
// extended, and w + 5 bits are exactly the width.  The magnitudes' sum stays below 2^(w+4): only the last
// adder, which takes the correction in, can carry out of a mode's width, and there the carry is cut.
module dot16_wide (
    input  logic [127:0] a,
    input  logic [127:0] b,
    input  logic         a_fp8,
    input  logic         b_fp8,
    output logic [40:0]  acc,
    output logic         nan
);
    logic high;  // whether columns 27 to 40 are in use
    assign high = a_fp8 & b_fp8;

    logic [15:0]      signs, nans;
    logic [16*41-1:0] terms;
    logic [35:0]      active;
    assign active = {{14{high}}, {22{1'b1}}};
    assign nan    = |nans;

    generate
        genvar k;
        for (k = 0; k < 16; k = k + 1) begin : lanes
            logic [35:0] magnitude;
            wide_lane lane (.a(a[8*k+:8]), .b(b[8*k+:8]), .a_fp8(a_fp8), .b_fp8(b_fp8),
                           .sign(signs[k]), .magnitude(magnitude), .nan(nans[k]));
            assign terms[41*k+:41] = {5'b00000, magnitude ^ (active & {36{signs[k]}})};
        end
    endgenerate

    logic [4:0]  negatives, minus;
    logic [40:0] correction;
    count16 counter (.bits(signs), .count(negatives));
    assign minus      = -negatives;
    assign correction = {minus & {5{high}}, 9'd0, minus & {5{~high}}, 17'd0, negatives};

    logic [40:0] sum, carry;
    logic [81:0] two;
    compress16 #(.WIDTH(41)) tree (.terms(terms), .pair(two));
    carry_save #(.WIDTH(41)) last (.x(two[0+:41]), .y(two[41+:41]), .z(correction), .sum(sum),
                                   .carry(carry));

    logic [27:0] low;
    assign low = {1'b0, sum[26:0]} + {1'b0, carry[26:0]};
    assign acc = {sum[40:27] + carry[40:27] + {13'd0, low[27] & high}, low[26:0]};
endmodule
