// Clock that runs only in cycles whose `enable` was high before the rising edge (latch and gate).
module clock_gate (
    input  logic clock,
    input  logic enable,
    output logic gated
);
    logic held;
    always_latch if (!clock) held = enable;
    assign gated = clock & held;
endmodule
