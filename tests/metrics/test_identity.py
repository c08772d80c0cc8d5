"""Identity measures and reference points: the values that follow from their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nabla_jax.errors import UserError
from nabla_jax.metrics import identity, references


def answer(seed, pixels=60, species=10, plumage=True):
    rng = np.random.default_rng(seed)
    lineup = rng.integers(0, 256, (species, pixels, 3)).astype(np.uint8)
    other = rng.integers(0, 256, (pixels, 3)).astype(np.uint8) if plumage else None
    return identity.RightAnswer(lineup[0], lineup[5], other, lineup)


def test_a_copy_of_the_right_answer_scores_one_and_the_sibling_zero():
    answers = [answer(i) for i in range(5)]
    for render, value, rank in [("right", 1.0, {1}), ("sibling", 0.0, None)]:
        errors = [identity.identity_errors(getattr(a, render), a) for a in answers]
        ni = identity.normalised_identity([e.right for e in errors], [e.sibling for e in errors])
        assert ni == pytest.approx(value, abs=1e-12)
        if rank:
            assert {e.rank for e in errors} == rank
        else:
            assert min(e.rank for e in errors) > 1


def test_terms_give_the_same_value_as_the_definition():
    rng = np.random.default_rng(0)
    errors, shuffled, sibling = rng.uniform(5, 60, (3, 40))
    top, bottom = identity.normalised_identity_terms(errors, sibling)
    assert top.sum() / bottom.sum() == pytest.approx(identity.normalised_identity(errors, sibling))
    top, bottom = identity.subject_effect_terms(errors, shuffled, sibling)
    effect = identity.normalised_identity(errors, sibling) - identity.normalised_identity(shuffled, sibling)
    assert top.sum() / bottom.sum() == pytest.approx(effect)


def test_subject_effect_is_positive_when_the_shuffled_subject_is_worse_and_zero_when_it_does_not_matter():
    sibling = np.full(6, 40.0)
    top, bottom = identity.subject_effect_terms(np.full(6, 10.0), np.full(6, 30.0), sibling)
    assert top.sum() / bottom.sum() == pytest.approx(0.5)
    top, _ = identity.subject_effect_terms(np.full(6, 10.0), np.full(6, 10.0), sibling)
    assert top.sum() == 0
    top, _ = identity.subject_effect_terms(np.full(6, 30.0), np.full(6, 10.0), sibling)
    assert top.sum() < 0


@given(st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_identity_falls_on_the_way_from_the_right_answer_to_the_sibling(seed):
    a = answer(seed)
    values = []
    for share in (0.0, 0.3, 0.6, 1.0):
        mixed = np.round((1 - share) * a.right.astype(float) + share * a.sibling).astype(np.uint8)
        errors = identity.identity_errors(mixed, a)
        values.append(identity.normalised_identity([errors.right], [errors.sibling]))
    assert values == sorted(values, reverse=True)
    assert values[1] == pytest.approx(0.7, abs=0.02)


def test_rank_counts_nearer_species_and_ties_count_against():
    lineup = np.stack([np.full((4, 3), value, np.uint8) for value in (100, 110, 140)])
    assert identity.rank_in_lineup(np.full((4, 3), 101, np.uint8), lineup) == 1
    assert identity.rank_in_lineup(np.full((4, 3), 105, np.uint8), lineup) == 2
    assert identity.rank_in_lineup(np.full((4, 3), 250, np.uint8), lineup) == 3


def test_no_pixels_and_no_other_plumage():
    nothing = np.zeros((0, 3), np.uint8)
    assert identity.identity_errors(nothing, answer(0, pixels=0)) is None
    assert identity.identity_errors(answer(0).right, answer(0, plumage=False)).sibling_plumage is None


def scene():
    rng = np.random.default_rng(1)
    subject, target = rng.integers(0, 256, (2, 30, 40, 3)).astype(np.uint8)
    subject_mask, target_mask = np.zeros((2, 30, 40), bool)
    subject_mask[4:14, 6:26] = True
    target_mask[10:28, 3:21] = True
    target_mask[12:15, 8:12] = False
    return subject, subject_mask, target, target_mask


@pytest.mark.parametrize("make", [references.flat_colour, references.paste_subject])
def test_reference_points_show_nothing_of_the_targets_bird(make):
    subject, subject_mask, target, target_mask = scene()
    other = target.copy()
    other[target_mask] = 255 - other[target_mask]
    first = make(subject, subject_mask, target, target_mask)
    assert np.array_equal(first, make(subject, subject_mask, other, target_mask))
    changed = (first != target).any(-1)
    rows, columns = references.box_of(target_mask)
    outside = np.ones_like(changed)
    outside[rows, columns] = False
    assert changed[target_mask].any() and not changed[outside].any()
    with pytest.raises(UserError, match="mask is empty"):
        make(subject, np.zeros_like(subject_mask), target, target_mask)


def test_flat_colour_is_the_mean_of_the_subjects_bird():
    subject, subject_mask, target, target_mask = scene()
    painted = references.flat_colour(subject, subject_mask, target, target_mask)
    assert np.abs(painted[target_mask] - subject[subject_mask].astype(float).mean(0)).max() <= 0.5


def test_pasting_a_subject_into_its_own_silhouette_changes_nothing():
    subject, subject_mask, _, _ = scene()
    assert np.array_equal(references.paste_subject(subject, subject_mask, subject, subject_mask), subject)


def test_a_choice_depends_on_seed_pair_and_purpose_alone():
    items = list(range(50))
    drawn = [references.choose(items, 0, f"{i}_1in2", "same-class") for i in range(400)]
    assert drawn == [references.choose(items, 0, f"{i}_1in2", "same-class") for i in range(400)]
    assert len(set(drawn)) > 40
    assert drawn != [references.choose(items, 1, f"{i}_1in2", "same-class") for i in range(400)]
