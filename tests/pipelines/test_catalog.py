import pytest

from pipelines.catalog import Video, read_catalog
from pipelines.config import CatalogConfig
from pipelines.errors import UserError

HEADER = "videoid,contentUrl,duration,page_dir,name\n"


def catalog(tmp_path, data: str | bytes):
    file = tmp_path / "v.csv"
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_catalog(CatalogConfig(csv=str(file), videos=str(tmp_path)), str(tmp_path))


def test_rows_are_sorted_by_id_and_quoted_captions_kept(tmp_path):
    videos = catalog(tmp_path, HEADER + '2,u,PT1S,p1,"a, ""b""\nc"\n1,u,PT1S,p0,plain\n').videos
    assert [(v.videoid, v.page_dir, v.caption) for v in videos] == [("1", "p0", "plain"), ("2", "p1", 'a, "b"\nc')]


def test_the_second_row_with_an_id_is_a_duplicate(tmp_path):
    videos = catalog(tmp_path, HEADER + "1,u,,p,first\n1,u,,q,second\n").videos
    assert [(v.caption, v.duplicate) for v in videos] == [("first", False), ("second", True)]


def test_a_caption_that_is_not_utf8_does_not_stop_the_catalog(tmp_path):
    assert catalog(tmp_path, HEADER.encode() + b"1,u,,p,caf\xe9\n").videos[0].caption == "caf\ufffd"


@pytest.mark.parametrize(
    ("data", "says"),
    [("a,b\n1,2\n", "no column videoid, name"), ("", "no column"), (HEADER, "holds no videos")],
)
def test_a_csv_that_is_no_catalog_is_refused_in_one_line(tmp_path, data, says):
    with pytest.raises(UserError, match=says):
        catalog(tmp_path, data)


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    assert catalog(tmp_path, b"\xef\xbb\xbf" + HEADER.encode() + b"1,u,,p,x\r\n").videos[0].videoid == "1"


def test_a_folder_of_videos_that_is_not_there_is_named_before_the_start(tmp_path):
    (tmp_path / "v.csv").write_text(HEADER + "1,u,,p,x\n")
    with pytest.raises(UserError, match=r"catalog\.videos=.*nodir: there is no such folder"):
        read_catalog(CatalogConfig(csv=str(tmp_path / "v.csv"), videos=str(tmp_path / "nodir")), str(tmp_path))


def test_a_missing_csv_is_named(tmp_path):
    with pytest.raises(UserError, match=r"catalog\.csv=.*nowhere\.csv"):
        read_catalog(CatalogConfig(csv=str(tmp_path / "nowhere.csv")), str(tmp_path))


@pytest.mark.parametrize(
    ("videoid", "page_dir"),
    [
        ("../x", ""),
        ("..", "p"),
        ("x", "../.."),
        ("x", "/etc"),
        ("/etc/passwd", ""),
        ("x", "a//b"),
        ("", "p"),
        ("a\0b", ""),
        ("a:b", ""),
    ],
)
def test_a_name_that_would_leave_the_folder_is_unsafe(videoid, page_dir):
    assert not Video(videoid, page_dir, "").safe


def test_an_ordinary_name_is_safe_and_its_page_folder_is_looked_in_first():
    video = Video("123", "000001_000050", "")
    assert video.safe
    assert video.paths == ["000001_000050/123.mp4", "123.mp4"]
