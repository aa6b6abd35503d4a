// E4M3 code of u / 6, rounded to nearest, ties to even, without a divider; u is a magnitude of at most
// 2688 given as a binary float (EXPONENT of bias 127, MANT fraction bits), so the result is at most 448.
//
// With u in [1.5, 3) * 2^(e+2), u / 6 lies in [1, 2) * 2^e.  E = max(e, -6) is the exponent of the
// result's last place, 2^(E-3), and the midpoint above j last places lies at u = 6 (j + 1/2) 2^(E-3),
// that is at w = u / 2^(E+2) = 3 (2j + 1) / 32: five fraction bits of w and a sticky bit decide.
module e4m3_sixth #(
    parameter MANT = 7
) (
    input  logic [8+MANT-1:0] u,
    output logic [6:0]        code
);
    logic [7:0]    exponent;
    logic [MANT:0] significand;
    assign exponent    = u[MANT+:8];
    assign significand = {|exponent, u[MANT-1:0]};

    // Field of E, e + 6 = exponent - 124 + upper, or how far below 0 it is.
    logic        upper, below;
    logic [3:0]  field;
    logic [7:0]  deficit;
    assign upper   = u[MANT-1];
    assign below   = exponent < 8'd124 - {7'd0, upper};
    assign deficit = 8'd124 - {7'd0, upper} - exponent;
    assign field   = below ? 4'd0 : exponent[3:0] - 4'd12 + {3'd0, upper};  // 124 = 12 modulo 16

    // w * 32 as seven bits and sticky, before and after the shift into the subnormal range.
    logic [MANT+8:0] window;  // two bits before the point, MANT + 7 after it
    logic [7:0]      normal, reached;
    assign window = upper ? {1'b0, significand, 7'd0} : {significand, 8'd0};
    assign normal = {window[MANT+8-:7], |window[MANT+1:0]};

    function automatic [7:0] shift_right(input [7:0] value, input [7:0] amount);
        logic [15:0] both;
        begin
            both = {value, 8'h00} >> amount[2:0];
            if (|amount[7:3]) both = {15'd0, |value};
            shift_right = {both[15:9], |both[8:0]};
        end
    endfunction
    assign reached = below ? shift_right(normal, deficit) : normal;

    // How many midpoints lie below w; at an equal one the even neighbour wins, above it where j is odd.
    function automatic [4:0] places(input [7:0] value);
        integer j;
        begin
            places = 5'd0;
            for (j = 0; j < 16; j = j + 1)
                if ({24'd0, value} >= 6 * (2 * j + 1) + (j % 2 == 0 ? 1 : 0)) places = j[4:0] + 5'd1;
        end
    endfunction
    assign code = {field, 3'd0} + {2'd0, places(reached)};
endmodule
