"""What the results in docs/results say, claim by claim: a page each, and an index.

    python -m benchmarks.claims            # write the pages, the index, and the numbers in README.md and docs
    python -m benchmarks.claims --check    # write nothing; exit code 1 if anything would change

A claim is one function in a file of this package, decorated with `@claim(GROUP)`. It reads runs that are kept in docs/results,
names the comparisons that decide it and the bound that each has to keep, and adds the words around them. The verdict is not
written: `judge` derives it from the interval and the bound.
"""
