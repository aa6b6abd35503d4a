// Yosys' latch that is open at 0, mapped onto the library's, open at 1.
module \$_DLATCH_N_ (input E, input D, output Q);
    wire open;
    INVX1 inverter (.A(E), .Y(open));
    LATCH latch (.CLK(open), .D(D), .Q(Q));
endmodule
