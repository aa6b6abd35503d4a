// Exact dot product of two FP4 tiles of 16: lane k in bits 4k+3 .. 4k, a 13-bit sum in units of 2^-2.
// Negative products are inverted, and -p = ~p + 1 - 2^8 made up for once, by N - 256 N (see dot16_wide).
module dot16_fp4 (
    input  logic [63:0] a,
    input  logic [63:0] b,
    output logic [12:0] acc
);
    logic [15:0]      signs;
    logic [16*13-1:0] terms;
    generate
        genvar k;
        for (k = 0; k < 16; k = k + 1) begin : lanes
            logic [7:0] magnitude;
            fp4_lane lane (.a(a[4*k+:4]), .b(b[4*k+:4]), .sign(signs[k]), .magnitude(magnitude));
            assign terms[13*k+:13] = {5'd0, magnitude ^ {8{signs[k]}}};
        end
    endgenerate

    logic [4:0] negatives, minus;
    count16 counter (.bits(signs), .count(negatives));
    assign minus = -negatives;

    logic [25:0] two;
    logic [12:0] sum, carry;
    compress16 #(.WIDTH(13)) tree (.terms(terms), .pair(two));
    carry_save #(.WIDTH(13)) last (.x(two[0+:13]), .y(two[13+:13]), .z({minus, 3'd0, negatives}),
                                   .sum(sum), .carry(carry));
    assign acc = sum + carry;
endmodule
