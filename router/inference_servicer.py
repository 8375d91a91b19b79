"""`pdmesh.v1.Inference` on the wire: what clients call."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager

import grpc

from pdmesh import __version__
from pdmesh.errors import OverloadedError, UnavailableError
from pdmesh.v1 import inference_pb2 as pb
from pdmesh.v1 import inference_pb2_grpc
from router.admission import Admission, limits
from router.config import RouterConfig
from router.dispatch import Dispatcher


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Admits requests and has them dispatched. Answers UNAVAILABLE until `open`."""

    def __init__(self, config: RouterConfig) -> None:
        self.num_active_requests = 0
        self._config = config
        self._started_at = time.monotonic()
        self._opened: tuple[Admission, Dispatcher] | None = None
        self._draining = False

    def open(self, admission: Admission, dispatcher: Dispatcher) -> None:
        """The tokenizer is loaded: from now on requests are served."""
        self._opened = admission, dispatcher

    def drain(self) -> None:
        """Takes no request any more; those that run go on."""
        self._draining = True

    async def Generate(
        self, request: pb.GenerateRequest, context: "grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]"
    ) -> AsyncIterator[pb.GenerateResponse]:
        admission, dispatcher = self._parts()
        with self._place():
            admitted = await admission.admit(request)
            async with aclosing(dispatcher.run(admitted, context.time_remaining)) as responses:
                async for response in responses:
                    yield response

    async def Tokenize(self, request: pb.TokenizeRequest, context: object) -> pb.TokenizeResponse:
        admission, _ = self._parts()
        token_ids = await admission.tokenize(request)
        model = admission.model()
        return pb.TokenizeResponse(token_ids=token_ids, max_model_len=model.max_model_len if model else 0)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: object) -> pb.DetokenizeResponse:
        admission, _ = self._parts()
        return pb.DetokenizeResponse(text=await admission.detokenize(request))

    async def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:
        admission, _ = self._parts()
        model = admission.model()
        return pb.ListModelsResponse(models=[model.to_pb()] if model else [])

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: object) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(
            version=__version__,
            uptime_s=time.monotonic() - self._started_at,
            num_active_requests=self.num_active_requests,
            max_active_requests=self._config.max_active_requests,
            limits=limits(self._config),
        )

    def _parts(self) -> tuple[Admission, Dispatcher]:
        if self._opened is None:
            raise UnavailableError(
                "the router is loading its tokenizer; try again in a moment", reason="ROUTER_LOADING", stage="admission"
            )
        return self._opened

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the router's request places. Raises OverloadedError where all are taken, or UnavailableError."""
        if self._draining:
            raise UnavailableError(
                "the router is shutting down; take another, or try again", reason="ROUTER_DRAINING", stage="admission"
            )
        limit = self._config.max_active_requests
        if self.num_active_requests >= limit:
            raise OverloadedError(
                f"the router holds {limit} requests, its limit; try again later",
                reason="ROUTER_FULL",
                stage="admission",
                details={"limit": str(limit)},
            )
        self.num_active_requests += 1
        try:
            yield
        finally:
            self.num_active_requests -= 1
