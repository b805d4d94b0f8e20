"""Exact divergence of networks of linear maps and elementwise functions, for the price of about one probe.

With linear maps W, the same for the whole batch, and elementwise functions of derivatives s, one a sample, a path
through the network has the Jacobian W_3 diag(s_2) W_2 diag(s_1) W_1, whose trace is cyclic:

    tr(W_3 S_2 W_2 S_1 W_1) = s_2^T (W_2 * (W_1 W_3)^T) s_1        (* elementwise)

One H x H matrix serves the whole batch: the divergence costs one more matrix product than the value, whatever D is.
Any callable is followed (`divflow.tape`), and its Jacobian read off the tape (`reader`) as a sum of products (`jacobian`),
whose paths from output to input (`paths`) have traces in closed form (`contract`), or go through a place where the network
is cut (`cuts`), such as the mean and the variance of a layer normalization, chosen by cost (`choose`). A function without a
rule is such a place, or lies between two: rows go through it by its own vector-Jacobian products.
"""
