// Three numbers to two with the same sum modulo 2^WIDTH.
module carry_save #(
    parameter WIDTH = 41
) (
    input  logic [WIDTH-1:0] x,
    input  logic [WIDTH-1:0] y,
    input  logic [WIDTH-1:0] z,
    output logic [WIDTH-1:0] sum,
    output logic [WIDTH-1:0] carry
);
    assign sum      = x ^ y ^ z;
    assign carry[0] = 1'b0;
    assign carry[WIDTH-1:1] = (x[WIDTH-2:0] & y[WIDTH-2:0])
                              | (z[WIDTH-2:0] & (x[WIDTH-2:0] ^ y[WIDTH-2:0]));
endmodule
