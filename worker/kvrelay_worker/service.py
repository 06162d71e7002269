"""WorkerService: what a worker tells about itself, and the order to drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from importlib.metadata import PackageNotFoundError, version

from kvrelay.v1 import common_pb2 as pb
from kvrelay.v1 import worker_pb2, worker_pb2_grpc
from kvrelay_core.error_info import error_of
from kvrelay_core.errors import InvalidRequestError
from kvrelay_engine.messages import GetLoad, LoadReply
from kvrelay_transfer.embedding_layout import EmbeddingLayout
from kvrelay_transfer.layout import KvLayout
from kvrelay_worker.drain import Drain
from kvrelay_worker.embedding_wire import embedding_layout_to_wire
from kvrelay_worker.engine_link import PendingCalls
from kvrelay_worker.stream_end import Context
from kvrelay_worker.wire import layout_to_wire, load_to_wire
from kvrelay_worker.worker import Worker

MIN_INTERVAL_S = 0.05
MAX_INTERVAL_S = 3600.0
REPEAT_S = 5.0  # a report that has not changed
_ROLES = {
    "prefill": worker_pb2.ROLE_PREFILL,
    "decode": worker_pb2.ROLE_DECODE,
    "encoder": worker_pb2.ROLE_ENCODER,
}


def software_version() -> str:
    try:
        return version("kvrelay")
    except PackageNotFoundError:
        return "unknown"


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, worker: Worker, drain: Drain) -> None:
        self._worker = worker
        self._drain = drain
        self._loads: PendingCalls[LoadReply] = PendingCalls(worker.engine)
        worker.engine.on(LoadReply, lambda reply: self._loads.answer(reply.call, reply))

    async def Describe(self, request: worker_pb2.DescribeRequest, context: Context) -> worker_pb2.DescribeResponse:
        worker, started = self._worker, self._worker.engine.started
        layout = started.layout
        return worker_pb2.DescribeResponse(
            worker=pb.WorkerRef(worker_id=worker.config.worker_id, address=worker.address),
            role=_ROLES[worker.config.role],
            engine_epoch=started.engine_epoch,
            model_fingerprint=started.model_fingerprint,
            layouts=[layout_to_wire(group) for group in started.groups if isinstance(group, KvLayout)],
            embedding_layouts=[embedding_layout_to_wire(layout)] if isinstance(layout, EmbeddingLayout) else (),
            num_blocks=started.num_blocks,
            max_model_len=started.max_model_len,
            max_num_seqs=started.max_num_seqs,
            max_batched_tokens=started.max_batched_tokens,
            vocab_size=started.vocab_size,
            connectors=[offer.name for offer in started.offers],
            software_version=software_version(),
            device=started.device,
            decode_alone_tokens=started.decode_alone_tokens,
        )

    async def WatchLoad(
        self, request: worker_pb2.WatchLoadRequest, context: Context
    ) -> AsyncIterator[worker_pb2.WatchLoadResponse]:
        """`interval_s` 0 asks for one report; its counts are checked for consistency inside the engine.

        Otherwise a report is sent when it differs from the last one, and every `REPEAT_S` at the latest: an idle
        worker should not wake its router.
        """
        interval_s = request.interval_s
        if interval_s == 0:
            yield await self._report(check_integrity=True)
            return
        if not MIN_INTERVAL_S <= interval_s <= MAX_INTERVAL_S:
            raise InvalidRequestError(f"interval_s must be 0 or {MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g} seconds")
        sent, repeat_in_s = None, 0.0
        while True:
            report = await self._report(check_integrity=False)
            if report != sent or repeat_in_s <= 0:
                yield report
                sent, repeat_in_s = report, REPEAT_S
            await asyncio.sleep(interval_s)
            repeat_in_s -= interval_s

    async def Drain(self, request: worker_pb2.DrainRequest, context: Context) -> worker_pb2.DrainResponse:
        """Answers when the drain is over; then the process ends. `deadline_s` 0 takes the configured one."""
        if not request.deadline_s >= 0:
            raise InvalidRequestError("deadline_s must be 0 or more seconds")
        self._worker.request_drain(request.deadline_s or self._worker.config.drain_s)
        return worker_pb2.DrainResponse(requests_left=await self._drain.wait())

    async def _report(self, *, check_integrity: bool) -> worker_pb2.WatchLoadResponse:
        worker = self._worker
        _ = worker.engine.started
        reply = await self._loads.ask(lambda call: GetLoad(call, check_integrity), worker.config.call_timeout_s)
        if reply.error is not None:
            raise error_of(reply.error)
        return load_to_wire(
            reply.load, streams=worker.streams.value, tasks=len(worker.request_tasks), draining=worker.is_draining
        )
