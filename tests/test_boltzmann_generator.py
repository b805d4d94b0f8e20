"""The example of a Boltzmann generator, in a small form."""

import runpy

from run import ROOT


def test_the_example(capsys):
    """A flow that is hardly trained is right all the same, within the errors that it states."""
    main = runpy.run_path(str(ROOT / "examples" / "boltzmann_generator.py"))["main"]
    found = main(steps=150, num_data=2_000, num_weighted=1_500, hidden=16)
    assert "by quadrature 29.6672" in capsys.readouterr().out
    assert 0.005 < found["effective_sample_fraction"] < 1
    assert abs(found["log_normalizer_deviation"]) < 5
    assert abs(found["outer_well_deviation"]) < 5
