"""Patterson's nested quadrature rules on [0, 1]: 3, 7, 15, 31 and 63 nodes, each with all nodes of the previous one."""

import functools
from typing import NamedTuple

import numpy as np

__all__ = ["COUNTS", "Patterson", "patterson"]

COUNTS = (7, 15, 31, 63)
"""Numbers of nodes of the rules that contain a smaller one."""


class Patterson(NamedTuple):
    """A rule with its nodes in increasing order; every second one, from the second on, is a node of the smaller rule.

    The difference of the two rules estimates the error of the smaller one.
    """

    nodes: np.ndarray
    weights: np.ndarray
    lesser_weights: np.ndarray


@functools.lru_cache
def patterson(count: int) -> Patterson:
    """Return Patterson's rule with 7, 15, 31 or 63 nodes, exact for polynomials up to degree 11, 23, 47 or 95.

    To the n nodes of the smaller rule n + 1 are added so that this degree, 3 n + 2, is the highest (Patterson 1968,
    Mathematics of Computation 22, "The optimum addition of points to quadrature formulae"; the first three are Gauss's).
    Nodes and weights were computed with 100 digits. The new nodes are the zeros of the polynomial that, times that of the
    old ones, is orthogonal to all of degree n.

    Args:
        count: the number of nodes.

    Raises:
        ValueError: another count.
    """
    if count not in COUNTS:
        raise ValueError(f"Patterson's rules have one of {COUNTS} nodes, but got {count}")
    lesser_weights = np.zeros(count)
    lesser_weights[1::2] = _both_halves(_WEIGHTS[count // 2], 1) / 2
    nodes = (_both_halves(_NODES, -1)[64 // (count + 1) - 1 :: 64 // (count + 1)] + 1) / 2
    return Patterson(nodes, _both_halves(_WEIGHTS[count], 1) / 2, lesser_weights)


def _both_halves(values: tuple[float, ...], sign: int) -> np.ndarray:
    return np.concatenate([sign * np.array(values[:0:-1]), values])


# On [-1, 1], from the middle: the nodes of all rules, and the weights of each.
# fmt: off
_NODES = (
    0.0, 0.05634431304659278997, 0.1124889431331866257, 0.168235251552207465, 0.2233866864289668816,
    0.2777498220218243151, 0.3311353932579768331, 0.3833593241987303469, 0.434243749346802558, 0.4836180269458410276,
    0.531319743644375624, 0.5771957100520458148, 0.6211029467372264029, 0.6629096600247805955, 0.7024962064915270786,
    0.7397560443526947587, 0.774596669241483377, 0.8069405319502176119, 0.8367259381688687355, 0.8639079381936904771,
    0.8884592328722569989, 0.9103711569570042925, 0.9296548574297400567, 0.9463428583734029051, 0.9604912687080202834,
    0.9721828747485817966, 0.9815311495537401069, 0.9886847575474294799, 0.9938319632127550222, 0.9972062593722219591,
    0.9990981249676675977, 0.9998728881203576119,
)
_WEIGHTS = {
    3: (
        0.8888888888888888889, 0.5555555555555555556,
    ),
    7: (
        0.4509165386584741423, 0.4013974147759622229, 0.2684880898683334407, 0.1046562260264672652,
    ),
    15: (
        0.2255104997982066874, 0.2191568584015874964, 0.200628529376989021, 0.1715119091363913808, 0.1344152552437842204,
        0.09292719531512453769, 0.0516032829970797397, 0.01700171962994026034,
    ),
    31: (
        0.1127552567207686916, 0.1119568730209534569, 0.1095784210559246382, 0.1056698935802348097, 0.1003142786117955788,
        0.09362710998126447362, 0.08575592004999035115, 0.07687962049900353104, 0.06720775429599070354, 0.05697950949412335741,
        0.04646289326175798654, 0.0359571033071293221, 0.02580759809617665356, 0.01644604985438781093, 0.008434565739321106246,
        0.002544780791561874415,
    ),
    63: (
        0.05637762836038471739, 0.05627769983125430127, 0.05597843651047631941, 0.05548140435655936399, 0.05478921052796286503,
        0.05390549933526606393, 0.05283494679011651986, 0.05158325395204845878, 0.05015713930589953741, 0.04856433040667319872,
        0.0468135549906280124, 0.04491453165363219741, 0.04287796002500773449, 0.04071551011694431893, 0.03843981024945553204,
        0.03606443278078257264, 0.03360387714820773054, 0.03107355111168796488, 0.02848975474583354861, 0.02586967932721474691,
        0.02323144663991026944, 0.02059423391591271115, 0.01797855156812827033, 0.0154067504665594978, 0.01290380010035126563,
        0.0104982469096213219, 0.008223007957235929669, 0.00611550682211724634, 0.004217630441558854839, 0.002579049794685688272,
        0.001265156556230068011, 0.0003632214818455306597,
    ),
}
# fmt: on
