// Requests to the server. An error answer becomes an Error with the server's message.

export async function ask(path, parameters = {}, signal = undefined) {
  const words = Object.entries(parameters).filter(([, value]) => value !== null);
  return answerOf(await request(`/api/${path}?${new URLSearchParams(words)}`, { signal }));
}

export async function upload(file) {
  const name = new URLSearchParams({ name: file.name });
  return answerOf(await request(`/api/pictures?${name}`, { method: "POST", body: file }));
}

export function pictureAddress(id, size) {
  return `/api/picture?${new URLSearchParams({ picture: id, size })}`;
}

// Return the error message of a picture; "" without an error.
export async function pictureError(address) {
  const response = await request(address, {});
  return response.ok ? "" : (await response.json()).error;
}

async function request(address, options) {
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
