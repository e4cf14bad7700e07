"""Seeds as a function of what they are for."""

import itertools

import torch

from niels_gpt.rng import generator_for, seed_for


def test_seeds_are_the_same_on_every_machine():
    known = {
        (42, "data"): 8802113687549639478,
        (42, "data", 3, 1): 8450249293142523186,
        (-1, "dropout", 10**12): 1173815952900984477,
    }
    for arguments, seed in known.items():
        assert seed_for(*arguments) == seed, arguments


def test_every_argument_counts_and_seeds_fit_a_generator():
    keys = list(itertools.product((0, 1, 42), ("data", "dropout", "data/1"), range(5), range(5)))
    seeds = [seed_for(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_arguments_do_not_run_into_each_other():
    assert seed_for(1, "data", 11, 1) != seed_for(1, "data", 1, 11)
    assert seed_for(11, "data", 1) != seed_for(1, "data", 11)


def test_a_generator_draws_the_same_again_and_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    draws = [torch.rand(4, generator=generator_for(7, "data", 2)) for _ in range(2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], torch.rand(4, generator=generator_for(7, "data", 3)))
    assert torch.equal(torch.get_rng_state(), before)
