// Activation quantization unit: 16 activations become an FP4 or an FP8 tile; combinational, no divider.
//
//     u            lane k at (9+MANT)k: binary floats (8 exponent bits, MANT fraction bits) in units of s2
//     sensitivity  lane k in bits 8k+7 .. 8k: E4M3, not negative (bit 7 is not read)
//     threshold    signed, units of 2^-29: floor(tau * 2^29), at most 2^61 - 1; -1: never FP4
//     fp4          1: the tile is FP4 (error <= threshold and no NaN among u)
//     scale        E4M3 scale of the FP4 tile (bit 7 is 0)
//     codes4       lane k in bits 4k+3 .. 4k: E2M1
//     codes8       lane k in bits 8k+7 .. 8k: E4M3 of u / 6; a NaN gives 7F with its sign
//     error        exact sum of sensitivity * (FP4 value - FP8 value)^2, units of 2^-29
//
// Values beyond +-2688 saturate, infinities too.  With a NaN among u, error, scale and codes4 count it
// as +-2688.
module quantize16 #(
    parameter MANT = 7
) (
    input  logic [16*(9+MANT)-1:0] u,
    input  logic [127:0]           sensitivity,
    input  logic [61:0]            threshold,
    output logic                   fp4,
    output logic [7:0]             scale,
    output logic [63:0]            codes4,
    output logic [127:0]           codes8,
    output logic [60:0]            error
);
    logic [16*(8+MANT)-1:0] magnitude;
    logic [15:0]            sign, nan, unused;
    logic [47:0]            code4;
    logic [111:0]           code8, weights;
    logic [143:0]           difference;
    logic [63:0]            place;

    assign scale[7] = 1'b0;
    quantize16_scale #(.MANT(MANT)) stage1 (.u(u), .magnitude(magnitude), .sign(sign), .nan(nan),
                                            .scale(scale[6:0]));
    quantize16_codes #(.MANT(MANT)) stage2 (.magnitude(magnitude), .scale(scale[6:0]), .code4(code4),
                                            .code8(code8), .difference(difference), .place(place));
    quantize16_error stage3 (.difference(difference), .place(place), .sensitivity(weights),
                             .threshold(threshold), .nan(|nan), .error(error), .fp4(fp4));
    generate
        genvar k;
        for (k = 0; k < 16; k = k + 1) begin : lanes
            assign weights[7*k+:7] = sensitivity[8*k+:7];
            assign unused[k]       = sensitivity[8*k+7];
            assign codes4[4*k+:4]  = {sign[k], code4[3*k+:3]};
            assign codes8[8*k+:8]  = {sign[k], code8[7*k+:7] | {7{nan[k]}}};
        end
    endgenerate
endmodule
