// Four numbers to two with the same sum modulo 2^WIDTH.
module compress4 #(
    parameter WIDTH = 41
) (
    input  logic [4*WIDTH-1:0] terms,
    output logic [2*WIDTH-1:0] pair
);
    logic [WIDTH-1:0] sum, carry;
    carry_save #(.WIDTH(WIDTH)) first (
        .x(terms[0+:WIDTH]), .y(terms[WIDTH+:WIDTH]), .z(terms[2*WIDTH+:WIDTH]),
        .sum(sum), .carry(carry));
    carry_save #(.WIDTH(WIDTH)) second (
        .x(sum), .y(carry), .z(terms[3*WIDTH+:WIDTH]),
        .sum(pair[0+:WIDTH]), .carry(pair[WIDTH+:WIDTH]));
endmodule
