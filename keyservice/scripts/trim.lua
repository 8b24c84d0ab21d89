#!lua flags=allow-oom
-- Cut the log shorter at its head. KEYS: log, epoch, meta. ARGV: number, nonce, trimmed_to before ("" for none) and after,
-- the first and the last id to go, the first id to stay, how many go, the caller's time (Unix seconds), drop_grace_s, then
-- the places (from 1) of those that are carried forward: appended again as they are.
-- Returns {how many went, how many were appended}. It runs when the server is out of memory, because it frees some.
-- Whatever the caller decided, nothing goes that lives by the server's clock and is not carried forward.
local refusal = check_epoch(KEYS[2], ARGV[1], ARGV[2])
if refusal then
  return refusal
end
if redis.call('HGET', KEYS[2], 'open') ~= '1' then
  return redis.error_reply('TRUST_CLOSED the epoch is not open')
end

local count = tonumber(ARGV[8])
local head = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', count + 1)
local trimmed_to = redis.call('HGET', KEYS[3], 'trimmed_to')
if not trimmed_to or trimmed_to ~= ARGV[3] or #head <= count or head[1][1] ~= ARGV[5]
  or head[count][1] ~= ARGV[6] or head[count + 1][1] ~= ARGV[7] then
  return redis.error_reply('TRUST_TRIMMED the head of the log is another one')
end

local function place(id)
  local epoch, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(epoch), tonumber(seq)
end

local function before(a, b)
  local a_epoch, a_seq = place(a)
  local b_epoch, b_seq = place(b)
  return a_epoch < b_epoch or (a_epoch == b_epoch and a_seq < b_seq)
end

if before(ARGV[4], ARGV[6]) or not before(ARGV[4], ARGV[7]) then
  return redis.error_reply('TRUST_TRIM_PLACE trimmed_to is not between what goes and what stays')
end

local now = math.min(math.floor(server_ms() / 1000), tonumber(ARGV[9]))
local line = now - tonumber(ARGV[10])

local function is_dead(fields)
  local kind, expires_at
  for i = 1, #fields, 2 do
    if fields[i] == 'kind' then
      kind = fields[i + 1]
    elseif fields[i] == 'expires_at' then
      expires_at = fields[i + 1]
    end
  end
  if kind == 'epoch' then
    return true
  end
  return expires_at ~= nil and #expires_at <= 16 and string.match(expires_at, '^[1-9]%d*$') ~= nil
    and tonumber(expires_at) <= line
end

-- All that an entry says, but for when a log took it.
local function content(fields)
  local parts = {}
  for i = 1, #fields, 2 do
    if fields[i] ~= 'at' then
      parts[#parts + 1] = #fields[i] .. ':' .. fields[i] .. #fields[i + 1] .. ':' .. fields[i + 1]
    end
  end
  return table.concat(parts)
end

local fields_max = 1000  -- a function takes a few thousand arguments; no release writes more than a dozen fields
local carried, contents = {}, nil
for i = 11, #ARGV do
  carried[tonumber(ARGV[i])] = true
end

-- Whether one of those that are carried forward says the same: copies of an entry need not all be.
local function is_copied(fields)
  if not contents then
    contents = {}
    for i in pairs(carried) do
      contents[content(head[i][2])] = true
    end
  end
  return contents[content(fields)]
end

for i = 1, count do
  local fields = head[i][2]
  if (carried[i] and #fields > fields_max) or not (carried[i] or is_dead(fields) or is_copied(fields)) then
    return redis.error_reply('TRUST_TRIM_LIVE an entry that lives would go')
  end
end

for i = 11, #ARGV do
  redis.call('XADD', KEYS[1], ARGV[1] .. '-*', unpack(head[tonumber(ARGV[i])][2]))
end
redis.call('HSET', KEYS[3], 'trimmed_to', ARGV[4])
redis.call('XTRIM', KEYS[1], 'MINID', '=', ARGV[7])
return {count, #ARGV - 10}
