// Requests to the server. Every failure is an Error with a message for the page.

export function pictureAddress(id, size) {
  return `/api/picture?${new URLSearchParams({ picture: id, size })}`;
}

let session = null; // of the server: one that was restarted may have other models and pictures under the same numbers

// Return an answer of the server: JSON, or a picture as a Blob.
export async function ask(path, parameters = {}, options = {}) {
  const given = Object.entries({ ...parameters, session }).filter(([, value]) => value !== null);
  let answer;
  try {
    const response = await fetch(`/api/${path}?${new URLSearchParams(given)}`, options);
    const type = response.headers.get("content-type") ?? "";
    if (type.startsWith("image/")) return await response.blob();
    const failed = { error: `The explorer failed (${response.status}): see the error in its terminal.` };
    answer = type.startsWith("application/json") ? await response.json() : failed;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The explorer does not answer: is `crate-fast explore` still running?");
  }
  if (answer.error) throw new Error(answer.error);
  session ??= answer.session ?? null;
  return answer;
}

export async function upload(file) {
  const body = await file.arrayBuffer().catch(() => {
    throw new Error(`${file.name} cannot be read: check that it is a file and still exists.`);
  });
  return ask("pictures", { name: file.name }, { method: "POST", body });
}
