// Exact dot product of two tiles of 16, each FP4 (E2M1) or FP8 (E4M3); combinational.
//
//     a, b          lane k in bits 8k+7 .. 8k; an FP4 code sits in the low nibble, the high one is not read
//     a_fp8, b_fp8  format of the whole tile
//     acc           signed sum, low `width` bits; the bits above are 0 (no sign extension, it would toggle)
//     nan           an E4M3 NaN (7F, FF) was among the operands; acc then counts it as +-480
//
//     mode            LSB of acc   largest |sum|            width
//     FP4 x FP4       2^-2         16 * 12^2                13
//     mixed           2^-10        16 * 229376 * 12         27
//     FP8 x FP8       2^-18        16 * 229376^2            41
//
// Lanes give sign and magnitude of w = 8, 22 or 36 bits.  A negative one is inverted, and what inversion
// lacks, -p = ~p + 1 - 2^w, is added once for all N negative lanes: N - N * 2^w.  So no sign is extended,
// and w + 5 bits are exactly the width.  The magnitudes' sum stays below 2^(w+4): only the last adder, which
// takes the correction in, can carry out of a mode's width, and there the carry is cut.
module dot16 (
    input  logic [127:0] a,
    input  logic [127:0] b,
    input  logic         a_fp8,
    input  logic         b_fp8,
    output logic [40:0]  acc,
    output logic         nan
);
    logic mid, high;  // whether columns 13 to 26, and 27 to 40, are in use
    assign mid  = a_fp8 | b_fp8;
    assign high = a_fp8 & b_fp8;

    logic [15:0]     signs, nans;
    logic [16*41-1:0] terms;
    logic [35:0]     active;
    assign active = {{14{high}}, {14{mid}}, 8'hFF};
    assign nan    = |nans;

    generate
        genvar k;
        for (k = 0; k < 16; k = k + 1) begin : lanes
            logic [35:0] magnitude;
            dot_lane lane (.a(a[8*k+:8]), .b(b[8*k+:8]), .a_fp8(a_fp8), .b_fp8(b_fp8),
                           .sign(signs[k]), .magnitude(magnitude), .nan(nans[k]));
            assign terms[41*k+:41] = {5'b00000, magnitude ^ (active & {36{signs[k]}})};
        end
    endgenerate

    function automatic [4:0] count(input [15:0] bits);
        integer i;
        begin
            count = 5'd0;
            for (i = 0; i < 16; i = i + 1) count = count + {4'd0, bits[i]};
        end
    endfunction

    logic [4:0]  negatives, minus;
    logic [40:0] correction;
    assign negatives  = count(signs);
    assign minus      = -negatives;
    assign correction = {minus & {5{high}}, 9'd0, minus & {5{mid & ~high}}, 9'd0, minus & {5{~mid}},
                         3'd0, negatives};

    logic [40:0]     sum, carry;
    logic [8*41-1:0] eight;
    logic [4*41-1:0] four;
    logic [2*41-1:0] two;

    generate
        for (k = 0; k < 4; k = k + 1) begin : fours
            compress4 part (.terms(terms[164*k+:164]), .pair(eight[82*k+:82]));
        end
    endgenerate
    compress4 low_half (.terms(eight[0+:164]), .pair(four[0+:82]));
    compress4 high_half (.terms(eight[164+:164]), .pair(four[82+:82]));
    compress4 both (.terms(four), .pair(two));
    carry_save last (.x(two[0+:41]), .y(two[41+:41]), .z(correction), .sum(sum),
                     .carry(carry));

    logic [13:0] part0;
    logic [14:0] part1;
    logic [13:0] part2;
    assign part0 = {1'b0, sum[12:0]} + {1'b0, carry[12:0]};
    assign part1 = {1'b0, sum[26:13]} + {1'b0, carry[26:13]} + {14'd0, part0[13] & mid};
    assign part2 = sum[40:27] + carry[40:27] + {13'd0, part1[14] & high};
    assign acc   = {part2, part1[13:0], part0[12:0]};
endmodule
