"""`python -m dav_bench` is `dav-bench`."""

from dav_bench.cli import main

main()
