// How many of 16 bits are set.
module count16 (
    input  logic [15:0] bits,
    output logic [4:0]  count
);
    function automatic [4:0] ones(input [15:0] value);
        integer i;
        begin
            ones = 5'd0;
            for (i = 0; i < 16; i = i + 1) ones = ones + {4'd0, value[i]};
        end
    endfunction
    assign count = ones(bits);
endmodule
