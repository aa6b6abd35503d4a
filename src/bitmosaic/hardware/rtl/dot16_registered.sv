// dot16 between registers, the unit that is synthesized and measured: result two rising edges after its
// operands were taken (one edge takes them, the next takes the result).  The registers of the high
// nibbles have clocks of their own, which rest while a tile is FP4.
module dot16_registered (
    input  logic         clock,
    input  logic [127:0] a,
    input  logic [127:0] b,
    input  logic         a_fp8,
    input  logic         b_fp8,
    output logic [40:0]  acc,
    output logic         nan
);
    logic [63:0]  low_a, low_b, high_a, high_b;
    logic [127:0] held_a, held_b;
    logic         held_a_fp8, held_b_fp8, clock_a, clock_b, sum_nan;
    logic [40:0]  sum;

    clock_gate gate_a (.clock(clock), .enable(a_fp8), .gated(clock_a));
    clock_gate gate_b (.clock(clock), .enable(b_fp8), .gated(clock_b));

    generate
        genvar k;
        for (k = 0; k < 16; k = k + 1) begin : lanes
            always_ff @(posedge clock) low_a[4*k+:4] <= a[8*k+:4];
            always_ff @(posedge clock) low_b[4*k+:4] <= b[8*k+:4];
            always_ff @(posedge clock_a) high_a[4*k+:4] <= a[8*k+4+:4];
            always_ff @(posedge clock_b) high_b[4*k+:4] <= b[8*k+4+:4];
            assign held_a[8*k+:8] = {high_a[4*k+:4], low_a[4*k+:4]};
            assign held_b[8*k+:8] = {high_b[4*k+:4], low_b[4*k+:4]};
        end
    endgenerate

    dot16 core (.a(held_a), .b(held_b), .a_fp8(held_a_fp8), .b_fp8(held_b_fp8), .acc(sum),
                .nan(sum_nan));

    always_ff @(posedge clock) begin
        held_a_fp8 <= a_fp8;
        held_b_fp8 <= b_fp8;
        acc        <= sum;
        nan        <= sum_nan;
    end
endmodule
