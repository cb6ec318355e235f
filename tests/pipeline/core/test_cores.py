"""The cores of a machine are counted within a container's limits, and divided between the engines on it."""

import pytest

from pipeline.core.cores import Division, divide, threads_each, usable_cores


@pytest.mark.parametrize(
    ("cpus", "quota", "cores"),
    [(8, None, 8), (8, 4.0, 4), (2, 4.0, 2), (8, 2.5, 2), (8, 1.99, 1), (8, 0.5, 1), (1, None, 1)],
)
def test_a_quota_counts_down_to_whole_cores_and_at_least_one(cpus, quota, cores):
    assert usable_cores(cpus, quota) == cores


@pytest.mark.parametrize(
    ("cores", "mlx", "second"), [(1, 1, 1), (2, 1, 1), (3, 2, 1), (4, 2, 2), (6, 4, 2), (8, 5, 3), (64, 42, 22)]
)
def test_a_third_of_the_cores_is_the_second_engines(cores, mlx, second):
    assert divide(cores, second_shares=True) == Division(mlx, second)


def test_the_budgets_add_up_to_the_cores_from_two_on():
    for cores in range(2, 200):
        assert sum(divide(cores, second_shares=True)) == cores


def test_an_engine_that_has_the_cpu_alone_gets_all_cores():
    assert divide(8, second_shares=False) == Division(8, 0)


def test_the_users_numbers_stay_and_the_rest_is_for_the_other_engine():
    assert divide(8, mlx=6, second_shares=True) == Division(6, 2)
    assert divide(8, second=1, second_shares=True) == Division(7, 1)
    assert divide(8, mlx=8, second=8, second_shares=True) == Division(8, 8)
    assert divide(8, mlx=12, second_shares=True) == Division(12, 1)
    assert divide(8, second=12, second_shares=True) == Division(1, 12)
    assert divide(8, mlx=3, second=2, second_shares=False) == Division(3, 2)


def test_two_models_of_one_worker_divide_its_threads():
    assert [threads_each(8, at_once) for at_once in (1, 2, 5)] == [8, 4, 4]
    assert threads_each(1, 3) == 1
