// An agent for Node 18 and later: serves topic "node" over vchan-http. No package is needed.
//
//     vchan dev run --http 8779 node agent.mjs        on a laptop
//     node agent.mjs http://127.0.0.1:8779 TOKEN      in a guest, beside vchan-http
//
// A cast is acknowledged before it is run: who does not get that far has not run it, and another
// gets it. A call is answered by "reply" alone.

const base = process.argv[2] ?? process.env.VCHAN_HTTP;
const token = process.argv[3] ?? process.env.VCHAN_HTTP_TOKEN;

const methods = {
  echo: (args) => args,
  note: ({ text }) => console.log(text),
  async later({ ms }) {
    await new Promise((done) => setTimeout(done, ms));
    return "done";
  },
};

async function ask(verb, members) {
  const response = await fetch(`${base}/v1/${verb}`, {
    method: "POST",
    headers: { Authorization: `Bearer ${token}` },
    body: JSON.stringify(members),
  });
  const text = await response.text();
  if (!response.ok) throw new Error(`${verb}: ${response.status} ${text}`);
  return text && JSON.parse(text);
}

async function run({ kind, lease, method, args }) {
  const isCall = kind === "call";
  if (!isCall) await ask("ack", { lease }); // an error: it is somebody else's by now
  let answer;
  try {
    if (!Object.hasOwn(methods, method)) throw new TypeError(`no method ${method}`);
    answer = { result: (await methods[method](args)) ?? null };
  } catch (error) {
    console.error(error);
    answer = { failure: { class: error.name, message: error.message } };
  }
  if (isCall) await ask("reply", { lease, ...answer });
}

for (;;) {
  try {
    const { requests } = await ask("receive", { topics: ["node"], max: 8, wait_s: 20 });
    for (const request of requests) {
      await run(request).catch((error) => console.error(error.message));
    }
  } catch (error) {
    console.error(`${error.message}: again in a second`); // vchan-http or vchan-guest is away
    await new Promise((done) => setTimeout(done, 1000));
  }
}
