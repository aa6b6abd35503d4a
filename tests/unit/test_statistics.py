import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmosaic.statistics import ReproducibleSum, get, names, sums
from bitmosaic.statistics.base import CAPACITY

SHAPE = (2, 3)
DIGIT = 2.0**-40
FLOAT32 = 2.0**-24
FLOAT64 = 2.0**-53

numbers = st.one_of(
    st.builds(
        lambda fraction, exponent: fraction * 10.0**exponent,
        st.floats(-10, 10, allow_subnormal=True),
        st.integers(-30, 30),
    ),
    st.sampled_from([0.0, -0.0, 5e-324, -1e-310, 2.0**-960, 2.0**40, -(2.0**40), 2.0**-40 * 3]),
    st.floats(-(2.0**120), 2.0**120, width=32),
)
contributions = st.lists(
    st.lists(numbers, min_size=6, max_size=6).map(
        lambda values: torch.tensor(values, dtype=torch.float64).reshape(SHAPE)
    ),
    min_size=1,
    max_size=12,
)


def total(parts, **options):
    result = ReproducibleSum(parts[0].shape)
    for part in parts:
        result.add(part, **options)
    return result


def assert_same_state(left, right):
    left, right = left.state(), right.state()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


class TestReproducibleSum:
    @given(contributions, st.randoms(use_true_random=False))
    def test_any_order_gives_the_same_bits(self, parts, shuffler):
        shuffled = list(parts)
        shuffler.shuffle(shuffled)
        assert_same_state(total(parts), total(shuffled))
        assert torch.equal(total(parts).value(), total(shuffled).value())

    @given(contributions, st.randoms(use_true_random=False))
    def test_any_split_and_merge_tree_gives_the_same_bits(self, parts, chooser):
        groups = [[] for _ in range(chooser.randint(1, 4))]
        for part in parts:
            chooser.choice(groups).append(part)
        sums = []
        for group in groups:  # a group may be empty: a process that saw no sample
            sums.append(ReproducibleSum(SHAPE))
            for part in group:
                sums[-1].add(part)
        while len(sums) > 1:
            left, right = (sums.pop(chooser.randrange(len(sums))) for _ in range(2))
            left.merge(right)
            sums.append(left)
        assert_same_state(sums[0], total(parts))

    @given(contributions)
    def test_error_is_within_the_bound_of_the_dropped_digits(self, parts):
        result = total(parts).value().double()
        for row in range(SHAPE[0]):
            largest = max(float(part[row].abs().max()) for part in parts)
            for column in range(SHAPE[1]):
                values = [float(part[row, column]) for part in parts]
                exact = math.fsum(values)
                # each contribution loses less than one unit of the lower bin; then two digits are
                # converted and added in float64, then rounded to float32 (or to its denormals)
                digits = max(DIGIT * largest, 2.0**-960)
                bound = len(parts) * (digits + 4 * FLOAT64 * largest)
                bound += FLOAT32 * (abs(exact) + bound) + 2.0**-150
                assert abs(float(result[row, column]) - exact) <= bound

    @given(contributions)
    def test_squares_are_those_of_float64(self, parts):
        assert_same_state(total(parts, squared=True), total([part.square() for part in parts]))

    @given(contributions)
    def test_state_rebuilds_and_continues(self, parts):
        whole = total(parts)
        half = total(parts[:1])
        rebuilt = ReproducibleSum.from_state(half.state())
        for part in parts[1:]:
            rebuilt.add(part)
        assert_same_state(rebuilt, whole)
        assert half.count == 1  # the copy is independent of its origin

    def test_plain_addition_would_not_pass(self):
        parts = [torch.tensor([[value]]) for value in (1e8, 1.0, -1e8, 1.0, 3e-9)]
        assert not torch.equal(sum(parts), sum(reversed(parts)))
        assert torch.equal(total(parts).value(), total(parts[::-1]).value())

    def test_digits_of_a_known_number(self):
        result = ReproducibleSum((1, 2))
        result.add(torch.tensor([[3.0 + 2.0**-40, -2.0 - 2.0**-39]], dtype=torch.float64))
        assert result.state()["high"].tolist() == [[3, -2]]
        assert result.state()["low"].tolist() == [[1, -2]]
        assert result.state()["top"].tolist() == [0]
        result.add(torch.tensor([[2.0**41, 0.0]], dtype=torch.float64))  # the row rises by one bin
        assert result.state()["high"].tolist() == [[2, 0]]
        assert result.state()["low"].tolist() == [[3, -2]]
        result.add(torch.tensor([[0.0, 2.0**121]], dtype=torch.float64))  # and by two: all dropped
        assert result.state()["high"].tolist() == [[0, 2]]
        assert result.state()["low"].tolist() == [[0, 0]]

    def test_low_precision_inputs_are_exact(self):
        generator = torch.Generator().manual_seed(0)
        parts = [torch.randn(3, 5, generator=generator).bfloat16() for _ in range(4)]
        assert_same_state(total(parts), total([part.double() for part in parts]))

    def test_chunks_do_not_matter(self, monkeypatch):
        generator = torch.Generator().manual_seed(0)
        parts = [torch.randn(7, 5, generator=generator) * 10.0**power for power in (0, 9, -9)]
        whole = total(parts)
        other = total([part * 1e20 for part in parts])
        other.merge(whole)
        monkeypatch.setattr(sums, "_CHUNK_ELEMENTS", 10)  # two rows, and a ragged end
        assert_same_state(total(parts), whole)
        merged = total(parts)
        merged.merge(total([part * 1e20 for part in parts]))
        assert_same_state(merged, other)
        assert torch.equal(merged.value(), other.value())

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_non_finite_is_refused_and_changes_nothing(self, value):
        result = total([torch.ones(2, 3)])
        bad = torch.full((2, 3), 5e30)
        bad[1, 2] = value
        with pytest.raises(ValueError, match="must be finite"):
            result.add(bad)
        assert_same_state(result, total([torch.ones(2, 3)]))

    def test_square_that_overflows_is_refused(self):
        with pytest.raises(ValueError, match="must be finite"):
            ReproducibleSum((1,)).add(torch.tensor([1e200], dtype=torch.float64), squared=True)

    def test_value_out_of_range_is_refused(self):
        result = total([torch.tensor([1e39], dtype=torch.float64)])
        with pytest.raises(OverflowError, match="range of float32"):
            result.value()

    def test_capacity_is_kept(self):
        full = total([torch.ones(1)]).state() | {"count": torch.tensor([CAPACITY])}
        full["high"] = torch.tensor([CAPACITY * (2**40 - 1)])  # the largest digits there can be
        result = ReproducibleSum.from_state(full)
        assert result.value().item() == CAPACITY * 2.0**40
        with pytest.raises(OverflowError, match="at most 4194304 contributions"):
            result.add(torch.ones(1))
        with pytest.raises(OverflowError, match="at most 4194304 contributions"):
            result.merge(total([torch.ones(1)]))
        assert result.count == CAPACITY

    def test_wrong_arguments_are_refused(self):
        result = ReproducibleSum((2, 3))
        with pytest.raises(ValueError, match=r"must be \(2, 3\), not \(3, 2\)"):
            result.add(torch.ones(3, 2))
        with pytest.raises(TypeError, match=r"floating-point tensor, not torch\.int64"):
            result.add(torch.ones(2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"must be \(2, 3\), not \(3, 2\)"):
            result.merge(ReproducibleSum((3, 2)))
        with pytest.raises(ValueError, match="at least one axis"):
            ReproducibleSum(())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"high": torch.zeros(2, 3)}, "must hold"),
            ({"high": torch.zeros(3, 3, dtype=torch.int64)}, "digits of one shape"),
            ({"top": torch.zeros(3, dtype=torch.int8)}, "one bin for each row"),
            ({"top": torch.full((2,), 26, dtype=torch.int8)}, "bins of a sum must be within"),
            ({"count": torch.tensor([-1])}, "count of a sum"),
            ({"count": torch.tensor([CAPACITY + 1])}, "count of a sum"),
            ({"low": torch.full((2, 3), 2**40)}, "low digits"),
            ({"extra": torch.zeros(1)}, "must hold"),
        ],
    )
    def test_impossible_state_is_refused(self, change, message):
        with pytest.raises(ValueError, match=message):
            ReproducibleSum.from_state(total([torch.ones(2, 3)]).state() | change)


class TestStatistics:
    @staticmethod
    def samples(count=5, tokens=16, width=6):
        generator = torch.Generator().manual_seed(1)
        return [
            torch.randn(tokens, width, generator=generator, dtype=torch.float64)
            for _ in range(count)
        ]

    def test_activation_norms(self):
        samples = self.samples()
        statistic = get("activation")((4, 6))
        for sample in samples:
            statistic.update(sample)
        tokens = torch.cat(samples)
        norms = statistic.value()
        # two roundings to float32 (the sum and the result) and 40-bit digits of each in_channel
        error = 2 * FLOAT32 + len(samples) * DIGIT + len(tokens) * FLOAT64
        for found, exact in (
            (norms.mean_abs, tokens.abs().mean(dim=0)),
            (norms.rms, tokens.square().mean(dim=0).sqrt()),
            (
                norms.rms_rest,
                torch.cat([part[1:] for part in samples]).square().mean(dim=0).sqrt(),
            ),
        ):
            assert ((found.double() - exact).abs() <= error * exact).all()
        assert statistic.observations == len(tokens)

    def test_hessian_is_the_sum_of_outer_products(self):
        samples = self.samples()
        statistic = get("hessian")((4, 6))
        for sample in samples:
            statistic.update(sample)
        tokens = torch.cat(samples)
        exact = tokens.T @ tokens
        terms = tokens.abs().T @ tokens.abs()
        bound = FLOAT32 * exact.abs() + 2 * len(tokens) * FLOAT64 * terms
        bound += len(samples) * DIGIT * terms.amax(dim=1, keepdim=True)
        assert ((statistic.value().double() - exact).abs() <= bound).all()
        assert statistic.observations == len(tokens)

    def test_hessian_of_bfloat16_inputs_is_summed_in_float32(self):
        inputs = torch.ones(300, 2).bfloat16()  # 300 is no bfloat16 number
        statistic = get("hessian")((4, 2))
        statistic.update(inputs)
        assert statistic.value().tolist() == [[300.0, 300.0], [300.0, 300.0]]

    @pytest.mark.parametrize("tokens", [16, 2])  # 2: fewer tokens in all than in_channels
    def test_pivots_are_what_the_later_in_channels_leave_unexplained(self, tokens):
        samples = [part * (1 + torch.arange(24)) for part in self.samples(5, tokens, 24)]
        statistic = get("pivots")((4, 24))
        for sample in samples:
            statistic.update(sample)
        together = torch.cat(samples)
        moments = together.T @ together / len(together)
        matrix = moments + 0.01 * moments.diagonal().mean() * torch.eye(24)
        order = torch.argsort(moments.diagonal(), descending=True)
        expected = torch.zeros(24, dtype=torch.float64)
        for place, column in enumerate(order):
            later = order[place + 1 :]
            cross = matrix[column, later]
            explained = cross @ torch.linalg.solve(matrix[later][:, later], cross)
            expected[column] = matrix[column, column] - explained
        # The sums are rounded to float32; what is left of them is at least the damping.
        slack = 48 * FLOAT32 * matrix.diagonal().amax() * matrix.diagonal().amax() / expected.amin()
        assert ((statistic.value().double() - expected).abs() <= slack).all()
        assert slack < expected.amin()

    def test_a_dead_in_channel_has_no_pivot(self):
        statistic = get("pivots")((4, 6))
        (sample,) = self.samples(1, 20, 6)
        sample[:, 2] = 0
        statistic.update(sample)
        assert (statistic.value() == 0).tolist() == [False, False, True, False, False, False]

    def test_moments_that_rounding_has_spoilt_are_refused(self, monkeypatch):
        statistic = get("pivots")((4, 6))
        statistic.update(self.samples(1, 5, 6)[0])
        monkeypatch.setattr(
            get("hessian"), "value", lambda _: torch.full((6, 6), -1.0).fill_diagonal_(1)
        )
        with pytest.raises(ValueError, match=r"over 5 tokens\. Calibrate on at least 6"):
            statistic.value()

    def test_fisher_squares_each_sequence_by_itself(self):
        statistic = get("fisher")((1, 2))
        statistic.update(torch.tensor([[1.0, -2.0]]))
        statistic.update(torch.tensor([[-1.0, 3.0]]))
        assert statistic.value().tolist() == [[2.0, 13.0]]
        assert statistic.observations == 2

    def test_nothing_observed_gives_zeros(self):
        assert get("activation")((2, 3)).value().rms.tolist() == [0.0, 0.0, 0.0]
        assert get("hessian")((2, 3)).value().tolist() == [[0.0] * 3] * 3
        assert get("fisher")((2, 3)).value().tolist() == [[0.0] * 3] * 2
        assert get("pivots")((2, 3)).value().tolist() == [0.0] * 3

    def test_no_token_reaches_an_expert(self):
        statistic = get("hessian")((2, 3))
        statistic.update(torch.empty(0, 3))
        assert statistic.value().abs().max() == 0

    def test_names_are_the_files(self):
        inputs = ("input_amax", "input_fisher")
        known = ("activation", "fisher", "hessian", *inputs, "mask_fisher", "pivots")
        assert names() == known
        with pytest.raises(ValueError, match=f"one of {', '.join(known)}, not 'x'"):
            get("x")


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_magnitudes_at_bin_borders(seed):
    shuffler = random.Random(seed)
    borders = [2.0 ** (40 * power) for power in range(-3, 3)]
    near = [math.nextafter(border, direction) for border in borders for direction in (0, math.inf)]
    values = [shuffler.choice((-1, 1)) * value for value in borders + near]
    parts = [torch.tensor([value], dtype=torch.float64) for value in values]
    shuffled = list(parts)
    shuffler.shuffle(shuffled)
    assert_same_state(total(parts), total(shuffled))
