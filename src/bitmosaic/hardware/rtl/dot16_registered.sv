// dot16 between registers, the unit that is synthesized and measured: result two rising edges after its
// operands were taken (one edge takes them, the next takes the result).
//
// Both data paths have operand registers of their own, with clocks that run only for tiles of theirs: the
// other path keeps its operands and stands still.  So do the high nibbles of an FP4 operand in the wide one.
module dot16_registered (
    input  logic         clock,
    input  logic [127:0] a,
    input  logic [127:0] b,
    input  logic         a_fp8,
    input  logic         b_fp8,
    output logic [40:0]  acc,
    output logic         nan
);
    logic         wide, held_wide, held_a_fp8, held_b_fp8, wide_nan;
    logic         clock_narrow, clock_wide, clock_a, clock_b;
    logic [63:0]  narrow_a, narrow_b, low_a, low_b, high_a, high_b;
    logic [127:0] wide_a, wide_b;
    logic [12:0]  narrow_acc;
    logic [40:0]  wide_acc;

    assign wide = a_fp8 | b_fp8;
    clock_gate gate_narrow (.clock(clock), .enable(~wide), .gated(clock_narrow));
    clock_gate gate_wide (.clock(clock), .enable(wide), .gated(clock_wide));
    clock_gate gate_a (.clock(clock), .enable(a_fp8), .gated(clock_a));
    clock_gate gate_b (.clock(clock), .enable(b_fp8), .gated(clock_b));

    generate
        genvar k;
        for (k = 0; k < 16; k = k + 1) begin : lanes
            always_ff @(posedge clock_narrow) narrow_a[4*k+:4] <= a[8*k+:4];
            always_ff @(posedge clock_narrow) narrow_b[4*k+:4] <= b[8*k+:4];
            always_ff @(posedge clock_wide) low_a[4*k+:4] <= a[8*k+:4];
            always_ff @(posedge clock_wide) low_b[4*k+:4] <= b[8*k+:4];
            always_ff @(posedge clock_a) high_a[4*k+:4] <= a[8*k+4+:4];
            always_ff @(posedge clock_b) high_b[4*k+:4] <= b[8*k+4+:4];
            assign wide_a[8*k+:8] = {high_a[4*k+:4], low_a[4*k+:4]};
            assign wide_b[8*k+:8] = {high_b[4*k+:4], low_b[4*k+:4]};
        end
    endgenerate
    always_ff @(posedge clock_wide) held_a_fp8 <= a_fp8;
    always_ff @(posedge clock_wide) held_b_fp8 <= b_fp8;

    dot16_fp4 narrow_path (.a(narrow_a), .b(narrow_b), .acc(narrow_acc));
    dot16_wide wide_path (.a(wide_a), .b(wide_b), .a_fp8(held_a_fp8), .b_fp8(held_b_fp8),
                          .acc(wide_acc), .nan(wide_nan));

    always_ff @(posedge clock) begin
        held_wide <= wide;
        acc       <= held_wide ? wide_acc : {28'd0, narrow_acc};
        nan       <= held_wide & wide_nan;
    end
endmodule
