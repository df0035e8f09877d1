// Signs in. The link's token stands after "#", which no browser sends to a server and no server can log.
const given = new URLSearchParams(location.hash.slice(1));
const form = document.getElementById("door");
const said = document.getElementById("said");
for (const field of ["name", "token"]) {
  if (given.get(field)) form.elements[field].value = given.get(field);
}
history.replaceState(null, "", location.pathname);

async function enter() {
  said.textContent = "";
  const body = JSON.stringify({ name: form.elements.name.value, token: form.elements.token.value });
  try {
    const answer = await fetch("/api/enter", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    if (answer.ok) location.reload();
    else said.textContent = (await answer.json()).error;
  } catch {
    said.textContent = "the server does not answer";
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  enter();
});
if (given.get("name") && given.get("token")) enter();
else (form.elements.name.value ? form.elements.token : form.elements.name).focus();
