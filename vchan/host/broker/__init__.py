"""The broker: one thread and one AMQP connection. Commands go in, events come out.

broker             the thread: takes the commands, keeps the connection
events             what it tells the daemon
config             where the broker is
vm_queues          one VM's AMQP channel, and the queues that it consumes
completions        what is over of a VM's requests: reply, acknowledgement, proof, in this order
reply_publisher    answers to callers; what the broker refuses is published again here
request_publisher  guests' requests; `vm.upward` tries again what the broker refuses
confirms           what either has published, and the broker has not confirmed
topology           exchanges and queues that must be there
queue_cleanup      when the queues of a VM that is no more may go (pure)
parked             messages that make this daemon fail, put aside
amqp               one connection to it, and what comes on it, without waiting; `amqp_content` reads
                   frames without trust, `amqp_frames` writes those of every message (both pure)
py_amqp            py-amqp, whose handshake, codec and heartbeats it uses
"""
