// Questions to the server. A complaint of the server becomes an Error with its sentence.

export async function ask(path, parameters = {}, signal = undefined) {
  const words = Object.entries(parameters).filter(([, value]) => value !== null);
  return answerOf(await reach(`/api/${path}?${new URLSearchParams(words)}`, { signal }));
}

export async function upload(file) {
  const name = new URLSearchParams({ name: file.name });
  return answerOf(await reach(`/api/pictures?${name}`, { method: "POST", body: file }));
}

export function pictureAddress(id, size) {
  return `/api/picture?${new URLSearchParams({ picture: id, size })}`;
}

// Why a picture cannot be shown; "" if it can.
export async function reasonAgainst(address) {
  const response = await reach(address, {});
  return response.ok ? "" : (await response.json()).error;
}

async function reach(address, options) {
  try {
    return await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The explorer does not answer: is `crate-fast explore` still running?");
  }
}

async function answerOf(response) {
  if (!(response.headers.get("content-type") || "").startsWith("application/json")) {
    throw new Error(`The explorer failed (${response.status}): its terminal says why.`);
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}
