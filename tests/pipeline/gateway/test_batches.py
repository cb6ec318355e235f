"""`/v1/files` and `/v1/batches` over HTTP, each caller's own."""

from __future__ import annotations

import msgspec
import pytest

from pipeline.broker.batches import BatchStore
from pipeline.gateway import uploads
from pipeline.gateway.identity import make_key
from pipeline.gateway.paging import page
from pipeline.gateway.statuses import HttpError
from pipeline.wire.batches import BatchPart, BatchStatus, FileObject
from tests.pipeline.gateway.conftest import Serve

CHAT = "/v1/chat/completions"
BODY = b'{"custom_id": "a"}\n'


async def stored(client, content=BODY, purpose="batch", **more):
    return await client.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": purpose}, **more)


async def created(client, file_id, endpoint=CHAT, window="24h", **more):
    body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": window, **more}
    return await client.post("/v1/batches", json=body)


def error_of(response):
    return response.status_code, response.json()["error"]["param"]


async def test_a_file_is_stored_shown_read_and_deleted(serve: Serve):
    content = b"x" * 3_000_000
    async with serve() as client:
        file = (await stored(client, content)).json()
        assert (file["bytes"], file["filename"], file["purpose"]) == (3_000_000, "in.jsonl", "batch")
        assert (await client.get(f"/v1/files/{file['id']}")).json() == file
        assert (await client.get(f"/v1/files/{file['id']}/content")).content == content
        assert (await client.get("/v1/files")).json()["data"] == [file]
        deleted = await client.delete(f"/v1/files/{file['id']}")
        assert deleted.json() == {"id": file["id"], "deleted": True, "object": "file"}
        for path in (f"/v1/files/{file['id']}", f"/v1/files/{file['id']}/content", "/v1/files/file-x", "/v1/files/.."):
            assert (await client.get(path)).status_code == 404
        assert (await client.get("/v1/files")).json()["data"] == []


async def test_what_is_no_file_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 100_000)
    monkeypatch.setattr(uploads, "_FORM_BYTES", 1000)
    async with serve() as client:
        assert error_of(await stored(client, purpose="fine-tune")) == (400, "purpose")
        assert error_of(await stored(client, b"")) == (400, "file")
        assert error_of(await client.post("/v1/files", json={})) == (400, "file")
        assert error_of(await client.post("/v1/files", data={"purpose": "batch"}, files={"other": b"x"})) == (
            400,
            "file",
        )
        odd = {"content-type": "multipart/form-data"}
        assert error_of(await client.post("/v1/files", content=b"x", headers=odd)) == (400, "file")
        assert (await stored(client, b"x" * 200_000)).status_code == 413


async def test_a_full_store_refuses_a_file(serve: Serve):
    async with serve(files_max_bytes=1 << 20) as client:
        assert (await stored(client, b"x" * 300_000)).status_code == 200
        refused = await stored(client, b"x" * 2_000_000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert len((await client.get("/v1/files")).json()["data"]) == 1


async def test_a_batch_is_created_listed_and_cancelled(serve: Serve, bus):
    async with serve() as client:
        file = (await stored(client)).json()
        first = (await created(client, file["id"], metadata={"job": "night"})).json()
        assert (first["status"], first["object"], first["metadata"]) == ("validating", "batch", {"job": "night"})
        assert first["expires_at"] - first["created_at"] == 86400
        second = (await created(client, file["id"], window="30m")).json()
        assert (await client.get(f"/v1/batches/{first['id']}")).json() == first
        listed = (await client.get("/v1/batches?limit=1")).json()
        assert ([each["id"] for each in listed["data"]], listed["has_more"]) == ([second["id"]], True)
        rest = (await client.get(f"/v1/batches?limit=1&after={second['id']}")).json()
        assert ([each["id"] for each in rest["data"]], rest["has_more"]) == ([first["id"]], False)
        for _ in range(2):
            assert (await client.post(f"/v1/batches/{first['id']}/cancel")).json()["status"] == "cancelling"
        assert (await client.get("/v1/batches/batch_nothing")).status_code == 404


async def test_a_batch_that_has_ended_is_not_cancelled(serve: Serve, bus):
    async with serve() as client:
        batch_id = (await created(client, (await stored(client)).json()["id"])).json()["id"]
        store = BatchStore(bus)
        ended = await store.show(await store.order(batch_id))
        ended.status = BatchStatus.COMPLETED
        state = store.journal(batch_id, BatchPart.STATE)
        await state.replace(msgspec.json.encode(ended))
        assert (await client.post(f"/v1/batches/{batch_id}/cancel")).json()["status"] == "completed"
        assert not await store.is_cancelled(batch_id)


async def test_a_bad_batch_is_refused(serve: Serve):
    async with serve() as client:
        file_id = (await stored(client)).json()["id"]
        assert error_of(await created(client, file_id, endpoint="/v1/audio")) == (400, "endpoint")
        assert error_of(await created(client, file_id, window="soon")) == (400, "completion_window")
        assert error_of(await created(client, "file-nothing")) == (404, "id")
        many = {str(number): "x" for number in range(17)}
        for metadata in ({"x": "y" * 513}, {"x" * 65: "y"}, many):
            assert error_of(await created(client, file_id, metadata=metadata)) == (400, "metadata")
        assert (await client.post("/v1/batches", json={"endpoint": CHAT})).status_code == 400
        assert (await client.get("/v1/batches?limit=none")).status_code == 400


async def test_a_key_sees_its_own_files_and_batches(serve: Serve):
    secret, key = make_key("alice")
    other_secret, other = make_key("bob")
    mine, theirs = ({"Authorization": f"Bearer {each}"} for each in (secret, other_secret))
    async with serve(http_keys=[key, other]) as client:
        client.headers.update(mine)
        file_id = (await stored(client)).json()["id"]
        batch_id = (await created(client, file_id)).json()["id"]
        client.headers.update(theirs)
        assert (await client.get("/v1/files")).json()["data"] == []
        assert (await client.get("/v1/batches")).json()["data"] == []
        assert error_of(await created(client, file_id)) == (404, "id")
        for method, path in (
            ("GET", f"/v1/files/{file_id}"),
            ("GET", f"/v1/files/{file_id}/content"),
            ("DELETE", f"/v1/files/{file_id}"),
            ("GET", f"/v1/batches/{batch_id}"),
            ("POST", f"/v1/batches/{batch_id}/cancel"),
        ):
            assert (await client.request(method, path)).status_code == 404
        client.headers.update(mine)
        assert (await client.get(f"/v1/batches/{batch_id}")).json()["status"] == "validating"


def test_a_page_follows_an_entry():
    entries = [FileObject(str(number), 0, 0, "", "", 0) for number in range(5)]
    assert ([e.id for e in page(entries, {"limit": "2", "after": "1"}, most=10)[0]]) == ["2", "3"]
    assert page(entries, {}, most=10)[1] is False
    for query in ({"limit": "0"}, {"limit": "-1"}, {"limit": "11"}, {"limit": "x"}, {"after": "9"}):
        with pytest.raises(HttpError):
            page(entries, query, most=10)
