// Sixteen numbers to two with the same sum modulo 2^WIDTH.
module compress16 #(
    parameter WIDTH = 41
) (
    input  logic [16*WIDTH-1:0] terms,
    output logic [2*WIDTH-1:0]  pair
);
    logic [8*WIDTH-1:0] eight;
    logic [4*WIDTH-1:0] four;
    generate
        genvar k;
        for (k = 0; k < 4; k = k + 1) begin : fours
            compress4 #(.WIDTH(WIDTH)) part (.terms(terms[4*WIDTH*k+:4*WIDTH]),
                                             .pair(eight[2*WIDTH*k+:2*WIDTH]));
        end
        for (k = 0; k < 2; k = k + 1) begin : halves
            compress4 #(.WIDTH(WIDTH)) part (.terms(eight[4*WIDTH*k+:4*WIDTH]),
                                             .pair(four[2*WIDTH*k+:2*WIDTH]));
        end
    endgenerate
    compress4 #(.WIDTH(WIDTH)) both (.terms(four), .pair(pair));
endmodule
