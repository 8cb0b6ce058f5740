import pytest

from lmdeploy_jax.cache.pages import PagePool, pages_for


def test_pages_for_rounds_up():
    assert [pages_for(n) for n in (0, 1, 63, 64, 65)] == [0, 1, 1, 1, 2]


def test_the_dump_page_is_never_handed_out():
    pool = PagePool(5)
    assert sorted(pool.take() for _ in range(4)) == [1, 2, 3, 4]
    with pytest.raises(IndexError, match="empty"):
        pool.take()


def test_a_shared_page_stays_until_its_last_user_is_gone():
    pool = PagePool(3)
    page = pool.take()
    pool.share(page)
    pool.release([page])
    assert pool.available == 1
    pool.release([page])
    assert pool.available == 2


def test_releasing_too_often_is_an_error():
    pool = PagePool(3)
    page = pool.take()
    pool.release([page])
    with pytest.raises(ValueError, match="released more often"):
        pool.release([page])


def test_integrity_check_sees_a_lost_page():
    pool = PagePool(4)
    page = pool.take()
    pool.check_integrity([page])
    with pytest.raises(AssertionError):
        pool.check_integrity([])
