"""The wire's fixed layouts and numbers, for `struct`.

Generated from the construct definitions: python -m vchan.protocol --write
"""

from typing import Final

MAGIC: Final = b"\xb6vch"
LAYOUT: Final = 1

# magic, layout, kind, flags, stream, length, total, seq, ack, credit
FRAME_HEADER: Final = ">4sBBBBLLQQQ"
# crc
CRC: Final = ">L"
# version_min, version_max, role, instance, nonce, echo, session, recv_next, send_base,
# send_next, credit, frame_bytes_max, message_bytes_max, reassembly_bytes_max
GREETING: Final = ">BBB16s16s16s16sQQQQLLL"
# features
FEATURES: Final = ">L"
# kind, flags, id, timeout_ms, monitor_ms, exchange_length, topic_length, server_length
REQUEST: Final = ">BB16sLLBBB"
# kind, id
RECEIPT: Final = ">B16s"
# invocation_length
RAW: Final = ">L"
# kind, flags, id
REPLY: Final = ">BB16s"
# kind, reason, id
RETURNED: Final = ">BB16s"
# kind, id
CANCEL: Final = ">B16s"
# kind, count
ID_LIST: Final = ">BH"
# kind, count
SUBSCRIBE: Final = ">BH"
# exchange_length, topic_length
SUBSCRIPTION: Final = ">BB"
# kind, version_min, version_max
OFFER: Final = ">BBB"
# kind, id, tag, received, credit, target_length, facts_length
OPEN: Final = ">B16s8sQQHH"
# kind, flags, id, tag, received, credit
PROGRESS: Final = ">BB16s8sQQ"
# kind, flags, id, tag, offset
PART: Final = ">BB16s8sQ"
# kind, reason, id
RESET: Final = ">BB16s"

KIND_HELLO: Final = 1
KIND_WELCOME: Final = 2
KIND_REFUSE: Final = 3
KIND_DATA: Final = 4
KIND_ACK: Final = 5
KIND_PING: Final = 6
KIND_PONG: Final = 7
KIND_REWIND: Final = 8

FLAG_FIRST: Final = 1
FLAG_LAST: Final = 2

ROLE_HOST: Final = 1
ROLE_GUEST: Final = 2

FEATURE_RAW_BODIES: Final = 1
FEATURE_PLAIN_PAYLOADS: Final = 2
FEATURE_BYTE_STREAMS: Final = 4
FEATURE_RAW_CASTS: Final = 8

MESSAGE_REQUEST: Final = 1
MESSAGE_RECEIPT: Final = 2
MESSAGE_REPLY: Final = 3
MESSAGE_RETURNED: Final = 4
MESSAGE_CANCEL: Final = 5
MESSAGE_SETTLED: Final = 6
MESSAGE_SUBSCRIBE: Final = 7
MESSAGE_HOLDING: Final = 8

REQUEST_FLAG_CALL: Final = 1
REQUEST_FLAG_FANOUT: Final = 2
REQUEST_FLAG_NOTIFICATION: Final = 4
REQUEST_FLAG_REDELIVERED: Final = 8
REQUEST_FLAG_OUT_OF_TURN: Final = 16
REQUEST_FLAG_LOCAL: Final = 32
REQUEST_FLAG_RAW: Final = 64
REQUEST_FLAG_IN_PLACE: Final = 128

REPLY_FLAG_FINAL: Final = 1
REPLY_FLAG_FAILURE: Final = 2
REPLY_FLAG_RAW: Final = 4

REASON_NO_AGENT: Final = 1
REASON_AGENT_GONE: Final = 2
REASON_BUSY: Final = 3
REASON_REFUSED: Final = 4
REASON_EXPIRED: Final = 5
REASON_NO_DOMAIN: Final = 6
REASON_RELEASED: Final = 7

BYTE_STREAM_OFFER: Final = 32
BYTE_STREAM_OPEN: Final = 33
BYTE_STREAM_PROGRESS: Final = 34
BYTE_STREAM_PART: Final = 35
BYTE_STREAM_RESET: Final = 36

PROGRESS_FLAG_ASK: Final = 1
PROGRESS_FLAG_ANSWER: Final = 2
PROGRESS_FLAG_REWIND: Final = 4
PROGRESS_FLAG_DONE: Final = 8

PART_FLAG_END: Final = 1

RESET_REASON_CLOSED: Final = 1
RESET_REASON_REFUSED: Final = 2
RESET_REASON_UNREACHABLE: Final = 3
RESET_REASON_BUSY: Final = 4
RESET_REASON_FORGOTTEN: Final = 5
RESET_REASON_VIOLATED: Final = 6
RESET_REASON_SILENT: Final = 7
RESET_REASON_UNSUPPORTED: Final = 8
RESET_REASON_RELEASED: Final = 9
