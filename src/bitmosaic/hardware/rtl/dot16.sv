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
// Two data paths, dot16_fp4 and dot16_wide: the one that is not asked for sees zeros.  In
// dot16_registered it keeps its last operands instead, and does not move at all.
module dot16 (
    input  logic [127:0] a,
    input  logic [127:0] b,
    input  logic         a_fp8,
    input  logic         b_fp8,
    output logic [40:0]  acc,
    output logic         nan
);
    logic         wide, wide_nan;
    logic [63:0]  narrow_a, narrow_b;
    logic [127:0] wide_a, wide_b;
    logic [12:0]  narrow_acc;
    logic [40:0]  wide_acc;
    assign wide   = a_fp8 | b_fp8;
    assign wide_a = a & {128{wide}};
    assign wide_b = b & {128{wide}};
    generate
        genvar k;
        for (k = 0; k < 16; k = k + 1) begin : lanes
            assign narrow_a[4*k+:4] = a[8*k+:4] & {4{~wide}};
            assign narrow_b[4*k+:4] = b[8*k+:4] & {4{~wide}};
        end
    endgenerate
    dot16_fp4 narrow_path (.a(narrow_a), .b(narrow_b), .acc(narrow_acc));
    dot16_wide wide_path (.a(wide_a), .b(wide_b), .a_fp8(a_fp8), .b_fp8(b_fp8), .acc(wide_acc),
                          .nan(wide_nan));
    assign acc = wide ? wide_acc : {28'd0, narrow_acc};
    assign nan = wide & wide_nan;
endmodule
