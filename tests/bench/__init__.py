"""The benchmark: vchan beside the raw channel and qemu-ga, all in one guest and one run.

Rules of this package
1. What is compared runs in the same guest, in turns: the same configuration differs by a third
   from one TCG guest to the next, and from one minute to the next.
2. A number is the median over the rounds; ratios are of such medians.
3. Every number is what a user of the thing would see from the host: nothing is left out of it.
"""
