// Node's JWT libraries, measured round by round on the command of the Python process that starts this one.
//
// One JSON object a line on stdin, one on stdout. The first: {"jwks", "tokens", "issuer", "audience"}, answered by
// {"names", "versions"}. Then {"name", "seconds"}, answered by {"us"}: microseconds a token, over at least that long.
//
// Everyone checks signature, exp, iss and aud of the same tokens with the same key, in its fastest documented way.

import { createPublicKey, verify } from "node:crypto";
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";

import { JwtVerifier } from "aws-jwt-verify";
import { createVerifier } from "fast-jwt";
import { importJWK, jwtVerify } from "jose";

const version = (name) =>
  JSON.parse(readFileSync(new URL(`node_modules/${name}/package.json`, import.meta.url))).version;

const versions = { node: process.versions.node, openssl: process.versions.openssl };
for (const name of ["aws-jwt-verify", "fast-jwt", "jose"]) versions[name] = version(name);

async function contestants({ jwks, tokens, issuer, audience }) {
  const [jwk] = jwks.keys;
  const key = createPublicKey({ key: jwk, format: "jwk" });
  const pem = key.export({ type: "spki", format: "pem" });
  const parts = tokens.map((token) => {
    const at = token.lastIndexOf(".");
    return [Buffer.from(token.slice(0, at)), Buffer.from(token.slice(at + 1), "base64url")];
  });

  const settings = { key: pem, algorithms: ["RS256"], allowedIss: issuer, allowedAud: audience, requiredClaims: ["exp"] };
  const fast = createVerifier(settings);
  const cached = createVerifier({ ...settings, cache: 10_000 });
  const cachedByToken = createVerifier({ ...settings, cache: 10_000, cacheKeyBuilder: (token) => token });

  const aws = JwtVerifier.create({ issuer, audience, jwksUri: "https://unused.invalid/jwks.json" });
  aws.cacheJwks(jwks);
  const imported = await importJWK(jwk, "RS256");
  const expected = { issuer, audience, algorithms: ["RS256"], requiredClaims: ["exp"] };

  const each = (call) => () => {
    for (const token of tokens) call(token);
  };
  return {
    "raw check (node:crypto)": () => {
      for (const [input, signature] of parts) {
        if (!verify("sha256", input, key, signature)) throw new Error("the signature is good");
      }
    },
    "fast-jwt": each(fast),
    "fast-jwt, cached": each(cached),
    "fast-jwt, cached by token": each(cachedByToken),
    "jose, key object": async () => {
      for (const token of tokens) await jwtVerify(token, imported, expected);
    },
    "aws-jwt-verify": each((token) => aws.verifySync(token)),
  };
}

async function measure(call, count, seconds) {
  await call();
  let batches = 0;
  const started = process.hrtime.bigint();
  const ends = started + BigInt(Math.round(seconds * 1e9));
  let now = started;
  while (now < ends) {
    await call();
    batches += 1;
    now = process.hrtime.bigint();
  }
  return Number(now - started) / 1e3 / batches / count;
}

let calls, count;
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  if (calls === undefined) {
    calls = await contestants(command);
    count = command.tokens.length;
    console.log(JSON.stringify({ names: Object.keys(calls), versions }));
  } else {
    console.log(JSON.stringify({ us: await measure(calls[command.name], count, command.seconds) }));
  }
}
