// One operand of a lane: E2M1 in the low nibble (fp8 = 0) or E4M3 in all eight bits (fp8 = 1).
//
//     value = (-1)^sign * significand * 2^shift * unit,    unit = 2^-1 for E2M1, 2^-9 for E4M3
//
// E2M1 magnitudes are 0 1 2 3 4 6 8 12 halves: two bits shifted by 0 to 2.  E4M3 has four bits shifted
// by 0 to 14.  The half that is not asked for sees zeros, so it rests: in E2M1 mode the high nibble is
// not read, and the upper bits of significand and shift stay 0.
module fp_decode (
    input  logic [7:0] code,
    input  logic       fp8,
    output logic       sign,
    output logic [3:0] significand,
    output logic [3:0] shift,
    output logic       nan
);
    logic [7:0] wide;
    logic [3:0] narrow;
    logic       normal8, normal4;

    assign wide    = code & {8{fp8}};
    assign narrow  = code[3:0] & {4{~fp8}};
    assign normal8 = |wide[6:3];
    assign normal4 = |narrow[2:1];

    assign sign        = wide[7] | narrow[3];
    assign significand = {normal8, wide[2:0]} | {2'b00, normal4, narrow[0]};
    assign shift       = (wide[6:3] - {3'b000, normal8}) | {2'b00, narrow[2:1] - {1'b0, normal4}};
    assign nan         = &wide[6:0];
endmodule
