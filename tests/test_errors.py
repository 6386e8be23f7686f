from dav_bench.errors import DavBenchError, ExitCode, near, problems


def test_an_error_reads_what_why_fix():
    err = DavBenchError("method 'draft' cannot run.", "It needs reward.grad.", "dav-bench list methods")
    assert str(err).splitlines() == [
        "method 'draft' cannot run.",
        "  It needs reward.grad.",
        "  Try: dav-bench list methods",
    ]
    assert err.code == ExitCode.USAGE == 2


def test_exit_codes_are_those_documented():
    assert [int(c) for c in ExitCode] == [0, 1, 2, 3, 4, 130]


def test_near_suggests_the_close_and_lists_the_few():
    assert near("widht", ["width", "alpha"]) == "; did you mean 'width'?"
    assert near("zzz", ["width", "alpha"]) == "; known: alpha, width"
    assert near("zzz", [f"name{i}" for i in range(99)]) == ""


def test_problems_lists_all():
    assert problems("no.", ["a", "b"]).why == "- a\n- b"
    assert problems("no.", ["a"]).why == "a"
